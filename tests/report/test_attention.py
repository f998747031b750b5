"""The attention part of the report, as text and as JSON."""

from __future__ import annotations

import io
import json
import math

import torch
from rich.console import Console
from torch import nn

import tcompress
from tcompress.report.attention import AttentionNumbers, AttentionReport
from tcompress.report.report import Report


def numbers(cosine, relative_l1=0.01, rmse=0.25):
    return AttentionNumbers(cosine=cosine, relative_l1=relative_l1, rmse=rmse)


def report(*attention):
    plain = tcompress.compress(nn.Sequential(nn.Linear(64, 64)), "int8").report
    return plain.model_copy(update={"attention": attention})


CHECKED = AttentionReport(
    name="layers.[0]",
    aliases=("other",),
    kind="BertSelfAttention",
    action="int8",
    total=numbers(0.99876),
    heads=(numbers(0.9999), numbers(0.91234), numbers(0.95)),
)
FLOAT = AttentionReport(name="", kind="Odd", action="float", reason="cosine 0.5 is below 0.999", total=numbers(0.5))
BROKEN = AttentionReport(
    name="b", kind="Odd", action="float", total=numbers(math.nan, math.inf), heads=(numbers(0.1), numbers(math.nan))
)


def test_worst_head():
    assert CHECKED.worst_head == 1
    assert BROKEN.worst_head == 1  # NaN is worse than anything
    assert FLOAT.worst_head is None


def test_text():
    written = io.StringIO()
    report(CHECKED, FLOAT, BROKEN).print(Console(file=written, width=200))  # wide: no cell is folded
    text = written.getvalue()
    assert "attention: 1 quantized, 2 in floating point" in text
    for part in ("layers.[0] (+1)", "0.99876", "0.0100", "2.50e-01", "1: 0.91234", "(root)", "below 0.999", "1: nan"):
        assert part in text, part


def test_json_round_trip():
    written = report(CHECKED, FLOAT)
    assert Report.from_json(written.to_json()) == written
    content = json.loads(report(BROKEN).to_json())["attention"][0]
    assert content["total"] == {"cosine": "nan", "relative_l1": "inf", "rmse": 0.25}
    (broken,) = Report.from_json(report(BROKEN).to_json()).attention
    assert math.isnan(broken.total.cosine)
    assert math.isinf(broken.total.relative_l1)


def test_json_from_before_there_was_attention():
    content = json.loads(report().to_json())
    del content["attention"]
    for step in content["recipe"]["steps"]:
        del step["attention"], step["min_cosine"]
    content["recipe"]["steps"].pop()
    assert Report.from_json(json.dumps(content)).attention == ()


def test_round_trip_of_a_real_one():
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    made = tcompress.compress(model, "int8", data=torch.randn(2, 6, 32)).report
    assert Report.from_json(made.to_json()) == made
    first = made.attention[0]
    assert f"{first.worst_head}: {min(h.cosine for h in first.heads):.5f}" in str(made)
    assert len(json.loads(made.to_json())["attention"][0]["heads"]) == 4
