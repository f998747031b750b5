"""The sweeps over the number of tokens."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import sweep_m
import sweep_s
from peer import CannotRun
from sweep import largest_step, summary

POINTS = [{"s": s, "ours_us": t, "torch_us": 20.0} for s, t in ((1, 10.0), (2, 11.0), (3, 22.0), (64, 15.0))]


def test_largest_step():
    assert largest_step(POINTS, "s") == (2, 2.0)


def test_summary():
    assert summary(POINTS, "S") == [
        "worst ratio to torch's time: 1.10 at S = 3",
        "largest step: from S = 2 to 3, 2.00 times the time",
        "slower than torch at S = 3 (1.10×)",
    ]
    assert summary(POINTS[3:], "S") == ["worst ratio to torch's time: 0.75 at S = 64", "slower than torch at no S"]


@pytest.mark.parametrize(
    ("script", "arguments", "about"),
    [
        (sweep_m, ["--m=1", "--m=2", "--k=64", "--n=64"], {"scheme": "W8A7", "k": 64, "n": 64}),
        (sweep_s, ["--s=1", "--s=2", "--h=2", "--d=16"], {"bits": "auto", "h": 2, "d": 16, "causal": False}),
    ],
)
def test_a_sweep_writes_numbers_and_a_picture(
    script, arguments: list[str], about: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
):
    target, picture = tmp_path / "a" / "sweep.json", tmp_path / "b" / "sweep.png"
    files = [f"--json={target}", f"--png={picture}"]
    monkeypatch.setattr(sys, "argv", ["sweep", *arguments, "--seconds=0.001", "--patience=0", *files])
    script.main()
    numbers = json.loads(target.read_text())
    assert about.items() <= numbers.items()
    (key,) = numbers["points"][0].keys() - {"ours_us", "torch_us"}
    assert [point[key] for point in numbers["points"]] == [1, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "worst ratio to torch's time" in capsys.readouterr().out


def test_a_sweep_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch):
    def cannot(*args: object):
        raise CannotRun("no kernel")

    monkeypatch.setattr(sweep_s, "tcompress_attention", lambda bits: cannot)
    monkeypatch.setattr(sys, "argv", ["sweep", "--s=1", "--patience=0"])
    with pytest.raises(SystemExit, match="not run: no kernel"):
        sweep_s.main()
