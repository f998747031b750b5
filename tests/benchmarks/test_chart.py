"""From results to a page and a picture."""

from __future__ import annotations

import sys
from pathlib import Path

import chart
import pytest
from results import Result, Run, add_speedups

MACHINE = {
    "cpu": "A processor",
    "logical_cpus": 4,
    "threads": 2,
    "path": "avx2",
    "read_gb_s": 20.0,
    "python": "3.11",
    "versions": {"torch": "2.13"},
}
SHAPE = "model.up-2x1000x500000"
MACS = 10**9


def fake(machine: dict | None = None, op: str = "int8_linear") -> Run:
    base = Result(SHAPE, "torch-fp32", [2.0, 4.0, 2.0], [False] * 3, [], MACS, 0.0, 1.0, 3.0, 10.0, 1.0)
    ours = Result(
        SHAPE, "tcompress-W8A8", [1.0, 1.0, 0.5], [False, True, False], [], MACS, 0.01, 0.9999, 3.0, 20.0, 2.5
    )
    absent = Result(SHAPE, "openvino-int8", not_run="the package openvino is not installed")
    results = [base, ours, absent]
    add_speedups(results)
    return Run(op, machine or MACHINE, results)


def test_page_and_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source, page, picture = tmp_path / "run.json", tmp_path / "run.md", tmp_path / "images" / "run.png"
    fake().save(source)
    monkeypatch.setattr(sys, "argv", ["chart.py", str(source), f"--markdown={page}", f"--png={picture}"])
    chart.main()
    lines = page.read_text().splitlines()
    assert "![Speedups over torch-fp32](images/run.png)" in lines
    assert lines[-3:] == [
        f"| {SHAPE} | torch-fp32 | 2.000 | 1.00 (1.00–1.00) | 500 | 10 | 1.0 | 0.00000 | 3.00 |  |",
        f"| {SHAPE} | tcompress-W8A8 | 1.000 | 4.00 (2.00–4.00) | 1000 | 20 | 2.5 | 0.01000 | 3.00 | noisy 1/3 |",
        "| all | openvino-int8 | - | - | - | - | - | - | - | not run: the package openvino is not installed |",
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert int.from_bytes(picture.read_bytes()[16:20], "big") == 1200, "pixels wide"


def test_the_table_of_attention_has_a_cosine():
    lines = chart.markdown(fake(op="decode_attention"), "run.png").splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert " | Σ\\|Δ\\| / Σ\\|O\\| | cosine | GHz | notes |" in table[0]
    assert "| 0.01000 | 0.999900 | 3.00 |" in table[3]
    assert len({line.replace("\\|", "").count("|") for line in table}) == 1, "as many cells in each line"


def test_runs_are_pooled():
    (base, ours, absent) = chart.merge([fake(), fake()]).results
    assert ours.speedups == [2.0, 4.0, 4.0] * 2
    assert len(base.milliseconds) == len(base.noisy) == 6
    assert absent.not_run


def test_runs_of_two_machines_are_refused():
    with pytest.raises(ValueError, match="machine: got .*'threads': 8.*, expected"):
        chart.merge([fake(), fake({**MACHINE, "threads": 8})])


def test_speedups_need_the_baseline():
    alone = [Result(SHAPE, "tcompress-W8A8", [1.0], [False])]
    add_speedups(alone)
    assert alone[0].speedup is None
