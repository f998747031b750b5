"""The report, as text and as JSON."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

import tcompress
from tcompress.report.report import Report
from tcompress.report.size import model_sizes

RECIPE = {"steps": [{"step": "quantize", "scheme": "W8A8", "ignore": ["re:head[12]"]}]}


def _report() -> Report:
    model = nn.ModuleDict({"exact": nn.Linear(2, 64), "body": nn.Linear(64, 64), "head1": nn.Linear(4, 4)})
    model["exact"].weight.data = torch.tensor([[127.0, -3.0]]).repeat(64, 1)
    return tcompress.compress(model, RECIPE).report


def test_weight_ratio_by_hand():
    torch.manual_seed(0)
    linear = nn.Linear(8, 4)
    (layer,) = tcompress.compress(nn.Sequential(linear), RECIPE).report.compressed
    w = linear.weight.detach().double()
    scale = w.abs().amax(1, keepdim=True) / 127
    noise = (torch.round(w / scale) * scale - w).square().sum()
    assert layer.weight_sqnr_db == pytest.approx(float(10 * torch.log10(w.square().sum() / noise)), abs=1e-3)


def test_json_round_trip():
    report = _report()
    assert Report.from_json(report.to_json()) == report
    content = json.loads(report.to_json())
    ratios = {layer["name"]: layer["weight_sqnr_db"] for layer in content["layers"]}
    assert ratios["exact"] == "inf"
    assert ratios["head1"] is None
    assert 35 < ratios["body"] < 60
    assert math.isinf(Report.from_json(report.to_json()).layers[0].weight_sqnr_db)


def test_text_names_everything():
    text = str(_report())
    for part in (
        "2 layers compressed, 1 skipped",
        "exact",
        "body",
        "W8A8",
        "head1",
        "re:head[12]",
        "on disk",
        "in memory",
    ):
        assert part in text


def test_sizes_count_shared_tensors_once():
    tied = nn.Sequential(nn.Linear(8, 8, False), nn.Linear(8, 8, False))
    tied[1].weight = tied[0].weight
    assert model_sizes(tied).disk == model_sizes(tied).resident == 256
    assert model_sizes(nn.Sequential(tied[0], tied[0])).disk == 256
    assert model_sizes(nn.ReLU()).disk == 0
    model = nn.Linear(2, 2)
    model.register_buffer("scratch", torch.zeros(5), persistent=False)
    assert (model_sizes(model).disk, model_sizes(model).resident) == (24, 44)
