"""How the memory of an attention is measured."""

from __future__ import annotations

import attention_memory
import pytest
from peer import CannotRun

H, D, S = 4, 16, 1024


@pytest.fixture(scope="module")
def measured() -> dict[tuple[str, int], int | None]:
    try:
        return {(peer, S): attention_memory.fresh(peer, S, H, D) for peer in ("tcompress-8", "torch-math")}
    except CannotRun as reason:
        pytest.skip(str(reason))


def test_scores_that_are_written_out_are_seen(measured: dict[tuple[str, int], int | None]):
    scores, result = 4 * H * S * S, 4 * H * S * D
    math, ours = measured["torch-math", S], measured["tcompress-8", S]
    assert math is not None
    assert ours is not None
    assert math > 1.5 * scores
    assert 0.5 * result < ours < math


def test_what_does_not_fit_is_not_run():
    assert attention_memory.fresh("torch-math", 1 << 20, H, D) is None


def test_table():
    mib = attention_memory.MIB
    found = {("a", 512): mib, ("a", 1024): 2 * mib, ("b", 512): 3 * mib, ("b", 1024): None}
    assert attention_memory.table(found, h=4, d=64).splitlines() == [
        "| S | result, MiB | a, MiB | of half S | b, MiB | of half S |",
        "|---:|---:|---:|---:|---:|---:|",
        "| 512 | 0.5 | 1.0 | - | 3.0 | - |",
        "| 1024 | 1.0 | 2.0 | 2.00× | - | - |",
    ]
