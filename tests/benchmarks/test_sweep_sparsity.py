"""The sweep over the part of the weights that is zero."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sweep_sparsity
from peer import CannotRun
from sweep_sparsity import Point, crossover, summary


def line(*speedups: float) -> list[Point]:
    return [Point("int8", "8x4", 10 * i, 1.0, speedup) for i, speedup in enumerate(speedups)]


def test_crossover():
    assert crossover(line(0.5, 1.1, 0.9, 1.0, 2.0)) == 30, "one lucky point below does not count"
    assert crossover(line(1.0, 2.0)) == 0
    assert crossover(line(1.5, 0.9)) is None


def test_summary():
    assert summary(line(0.5, 1.0, 2.0), {"int4 8x4": "no op"}) == [
        "int8 8x4: faster from 10% on; at most 2.00× dense, at 20%",
        "int4 8x4: not run: no op",
    ]
    assert summary(line(0.5, 0.75), {}) == ["int8 8x4: not faster at the highest sparsity; at most 0.75× dense, at 10%"]


def sweep_arguments(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    small = ["--m=2", "--k=128", "--n=64", "--seconds=0.001", "--patience=0"]
    monkeypatch.setattr(sys, "argv", ["sweep", *small, *arguments])


def test_numbers_and_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    target, picture = tmp_path / "a" / "sweep.json", tmp_path / "b" / "sweep.png"
    sweep_arguments(monkeypatch, "--sparsity=50", "--sparsity=90", f"--json={target}", f"--png={picture}")
    sweep_sparsity.main()
    numbers = json.loads(target.read_text())
    assert (numbers["m"], numbers["k"], numbers["n"]) == (2, 128, 64)
    run = {f"{p['kind']} {p['pattern']}" for p in numbers["points"]}
    assert run | numbers["not_run"].keys() == {" ".join(key) for key in sweep_sparsity.SPARSE}
    assert {p["percent"] for p in numbers["points"] if p["pattern"] == "8x4"} == {50, 90}
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "int8 8x4: " in capsys.readouterr().out


def test_a_sweep_of_nothing_says_why(monkeypatch: pytest.MonkeyPatch):
    def cannot(*args: object):
        raise CannotRun("no kernel")

    monkeypatch.setattr(sweep_sparsity, "SPARSE", dict.fromkeys(sweep_sparsity.SPARSE, cannot))
    sweep_arguments(monkeypatch, "--sparsity=50")
    with pytest.raises(SystemExit, match="not run: no kernel"):
        sweep_sparsity.main()
