from __future__ import annotations

import math

from tcompress.advisor.advice import Advice, Measured, dominates, ranked
from tcompress.advisor.target import Target


def row(name, disk, seconds, loss, **fields):
    return Measured(name=name, disk=disk, memory=disk, seconds=seconds, loss=loss, quality=1 - loss, **fields)


def test_dominance():
    small, large = row("small", 10, 1.0, 0.01), row("large", 20, 1.0, 0.01)
    assert dominates(small, large)
    assert not dominates(large, small)
    assert not dominates(small, small)
    assert not dominates(row("fast", 20, 0.5, 0.01), small)
    assert not dominates(row("within noise", 20, 0.99, 0.01), large)
    assert dominates(row("within noise", 10, 1.02, 0.01), large)
    assert dominates(small, row("nan", 10, 1.0, math.nan))
    assert not dominates(row("nan", 10, 1.0, math.nan), small)


def test_without_times_and_quality_bytes_decide():
    small, large = (Measured(name=str(n), disk=n, memory=n) for n in (10, 20))
    assert dominates(small, large)


def test_the_order():
    failed = Measured(name="failed", failure="why")
    rows = [
        failed,
        row("missed", 1, 0.1, 0.5, misses=("x",)),
        row("missed twice", 1, 0.1, 0.4, misses=("x", "y")),
        row("dominated", 30, 2.0, 0.02),
        row("slow", 10, 2.0, 0.01),
        row("fast", 10, 1.0, 0.02),
    ]
    found = ranked(rows)
    assert [r.name for r in found] == ["fast", "slow", "dominated", "missed", "missed twice", "failed"]
    assert [r.dominated_by is None for r in found] == [True, True, False, False, True, True]


def test_json_and_text():
    advice = Advice(target=Target(), baseline=row("as it is", 40, 2.0, 0.0), rows=ranked([row("a", 10, 1.0, 0.1)]))
    assert Advice.model_validate_json(advice.to_json()) == advice
    assert advice.best.name == "a"
    text = str(advice)
    assert "as it is" in text
    assert "+10.00%" in text
    assert text.endswith("take 'a'")
