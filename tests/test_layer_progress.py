"""What a terminal is told while layers are solved."""

from __future__ import annotations

import io
import re
import sys
import warnings

import pytest
import torch
from rich.console import Console
from test_resume_run import AUTOROUND, BLOCKS, GPTQ, Stack
from torch import nn

import tcompress
from tcompress import layer_progress
from tcompress.errors import CompressionWarning

LINE = r"layers\.{}: up (\d+\.\d) dB, down (\d+\.\d) dB"


@pytest.fixture
def stack():
    torch.manual_seed(0)
    return Stack().eval(), [torch.randn(4, 8, 32) for _ in range(3)]


def shown(monkeypatch, stack, step, terminal=True, **options):
    """What is on the terminal, without its control sequences."""
    model, data = stack
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200)
    for module in (layer_progress, sys.modules["tcompress.compress"]):
        monkeypatch.setattr(module, "get_console", lambda: console)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        result = tcompress.compress(model, {"steps": [step]}, data, **options)
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue()), result


def test_each_blocks_layers_and_how_they_came_out(monkeypatch, stack):
    text, result = shown(monkeypatch, stack, GPTQ)
    for i in range(BLOCKS):
        assert re.search(LINE.format(i), text), text
    assert re.search(r"outside of blocks: head \d+\.\d dB", text)
    assert "9/9" in text
    first = re.search(LINE.format(0), text)
    (report,) = [layer for layer in result.report.layers if layer.name == "layers.0.up"]  # on the same inputs
    assert float(first[1]) == pytest.approx(report.output_sqnr_db, abs=0.2)


def test_nothing_where_there_is_no_terminal(monkeypatch, stack):
    monkeypatch.setattr("tcompress.solve.output_sqnr_db", None)  # nor is anything measured for it
    text, _ = shown(monkeypatch, stack, GPTQ, terminal=False)
    assert text == ""
    text, _ = shown(monkeypatch, stack, GPTQ, progress=False)
    assert text == ""


def test_what_autoround_learned(monkeypatch, stack):
    text, _ = shown(monkeypatch, stack, {**AUTOROUND, "iterations": 5})
    found = re.search(r"layers\.0: mean squared error of the block (\S+) -> (\S+)", text)
    assert 0 < float(found[2]) <= float(found[1])


def test_what_an_earlier_run_did(monkeypatch, stack, tmp_path):
    shown(monkeypatch, stack, GPTQ, resume=tmp_path)
    text, _ = shown(monkeypatch, stack, GPTQ, resume=tmp_path)
    assert "layers.0: taken from the run before" in text
    assert "outside of blocks: taken from the run before" in text


def test_all_at_once(monkeypatch):
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval()
    text, _ = shown(monkeypatch, (model, [torch.randn(64, 32)]), GPTQ)
    assert re.search(r"all layers: 0 \d+\.\d dB, 2 \d+\.\d dB", text)
