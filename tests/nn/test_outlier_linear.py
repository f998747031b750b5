"""Outlier inputs in floating point."""

import copy

import pytest
import torch
from torch import nn

import tcompress
from tcompress.nn import OutlierLinear, QuantizedLinear

STEP = {"step": "quantize", "scheme": "W8A8", "outliers": 4}


class Two(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.first, self.second = nn.Linear(32, 48, bias), nn.Linear(48, 16, bias)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def inputs(n=64):
    x = torch.randn(n, 32, generator=torch.Generator().manual_seed(1))
    x[:, [3, 20]] *= 40
    return x


def compressed(bias=True, **step):
    torch.manual_seed(0)
    model = Two(bias).eval()
    with pytest.warns(tcompress.errors.CompressionWarning):  # no chain of blocks
        return model, tcompress.compress(model, {"steps": [{**STEP, **step}]}, data=inputs())


@pytest.mark.parametrize("scheme", ["W8A8", "W8A7", "W4A8-g32", "W4A16-g32"])
@pytest.mark.parametrize("bias", [True, False])
def test_outliers_are_exact_and_the_rest_is_fine(scheme, bias):
    model, result = compressed(bias, scheme=scheme)
    layer = result.model.first
    assert isinstance(layer, OutlierLinear)
    assert layer.outlier_columns.tolist() == [3, 20]
    assert isinstance(result.model.second, QuantizedLinear)
    assert torch.equal(layer.dequantize()[:, [3, 20]], model.first.weight[:, [3, 20]])
    x = inputs(9)
    rest = x.clone()
    rest[:, [3, 20]] = 0
    weight = layer.packed.dequantize()
    assert weight[:, [3, 20]].eq(0).all()
    with torch.no_grad():
        expected = layer.rest(rest) + x[:, [3, 20]] @ model.first.weight[:, [3, 20]].T
        torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_less_is_lost():
    model, result = compressed()
    plain = tcompress.compress(model, {"steps": [{"step": "quantize", "scheme": "W8A8"}]}).model
    x = inputs(200)
    with torch.no_grad():
        errors = [float((m.first(x) - model.first(x)).norm()) for m in (result.model, plain)]
    assert errors[0] < 0.2 * errors[1]


def test_report():
    _, result = compressed()
    first, second = result.report.layers
    assert first.reason == "2 outlier inputs in floating point"
    assert second.reason == ""
    assert first.bytes_after > 48 * 32


def test_saved_and_loaded(tmp_path):
    model, result = compressed()
    tcompress.save(result.model, tmp_path / "saved")
    same = tcompress.load(tmp_path / "saved", model=copy.deepcopy(model))
    assert isinstance(same.first, OutlierLinear)
    x = inputs(7)
    with torch.inference_mode():
        assert torch.equal(same(x), result.model(x))
    other = copy.deepcopy(model)
    other.first = nn.Linear(32, 50)
    with pytest.raises(ValueError, match=r"load: model.first: got .*\[50, 32\].*, expected .*\[48, 32\]"):
        tcompress.load(tmp_path / "saved", model=other)


def test_compiled_and_in_other_types():
    _, result = compressed()
    layer, x = result.model.first, inputs(5)
    with torch.no_grad():
        eager = layer(x)
        assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(x), eager)
        half = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), eager, rtol=0.05, atol=0.5)


def test_compressed_already():
    _, result = compressed()
    with pytest.raises(ValueError, match="already compressed"):
        tcompress.compress(result.model, {"steps": [STEP]}, data=inputs())


def test_errors():
    with pytest.raises(ValueError, match="OutlierLinear: outliers: got 0, expected 1 to in_features, 8"):
        OutlierLinear(8, 4, 0)
    with pytest.raises(ValueError, match=r"OutlierLinear: input: got \[2, 7\], expected \[..., 8\]"):
        OutlierLinear(8, 4, 1)(torch.zeros(2, 7))
