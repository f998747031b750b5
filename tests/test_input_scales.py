"""Static activations through the front door."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.nn import OutlierLinear, QuantizedLinear
from tcompress.quantize.observers import MinMaxObserver, MovingAverageObserver, MseObserver, PercentileObserver

STATIC = {"scheme": "W8A8-static", "observer": "minmax"}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.idle = nn.Linear(16, 32), nn.Linear(32, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(torch.relu(self.first(x)))


def net():
    torch.manual_seed(0)
    return Net().eval()


def batches(count=4):
    return [torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(i)) * (1 + i) for i in range(count)]


def compressed(model, step, data, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        return tcompress.compress(model, {"steps": [step]}, data, progress=False, **options)


@pytest.mark.parametrize("name", ["W8A8-static", "W8A7-static"])
def test_minmax_scales_are_those_of_the_data(name):
    model, data = net(), batches()
    result = compressed(model, {"scheme": name, "observer": "minmax"}, data).model
    given = {"first": torch.cat(data), "second": torch.relu(model.first(torch.cat(data)))}
    for path, x in given.items():
        layer, x = getattr(result, path), x.detach().numpy()
        assert isinstance(layer, QuantizedLinear)
        if name == "W8A8-static":
            scale = np.abs(x).max() / 127
        else:
            lo, hi = min(x.min(), 0), max(x.max(), 0)
            scale = (hi - lo) / 127
            assert int(layer.input_zero_point) == np.rint(-lo / scale)
        assert float(layer.input_scale) == pytest.approx(scale, rel=1e-6)
    assert float(result.first.input_scale) != float(result.second.input_scale)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("minmax", MinMaxObserver),
        ("percentile", PercentileObserver),
        ("moving_average", MovingAverageObserver),
        ("mse", lambda: MseObserver(8, True)),
    ],
)
def test_observers(name, make):
    data, expected = batches(), make()
    for batch in data:
        expected.observe(batch)
    result = compressed(net(), {"scheme": "W8A8-static", "observer": name}, data)
    assert float(result.model.first.input_scale) == pytest.approx(expected.scale(8, True)[0], rel=1e-6)
    lo, hi = expected.range()
    assert f"inputs in {lo:.3g} … {hi:.3g}" in next(r.reason for r in result.report.layers if r.name == "first")


def test_the_default_observer_is_in_the_recipe():
    recipe = tcompress.Recipe.load({"steps": [{"scheme": "W8A8-static"}]})
    assert recipe.steps[0].observer == "mse"
    assert tcompress.Recipe.from_yaml(recipe.to_yaml()) == recipe
    with pytest.raises(ValueError, match="got observer with W8A8, expected it with a static scheme only"):
        tcompress.Recipe.load({"steps": [{"scheme": "W8A8", "observer": "mse"}]})
    with pytest.raises(ValueError, match="got observer with attention, expected it with a static scheme only"):
        tcompress.Recipe.load({"steps": [{"attention": "int8", "observer": "mse"}]})
    with pytest.raises(ValueError, match="got W8A8-static, expected dynamic activations: sparse kernels"):
        tcompress.Recipe.load({"steps": [{"step": "sparse", "scheme": "W8A8-static"}]})


def test_no_data_is_an_error():
    with pytest.raises(ValueError, match="data: got none, expected calibration samples; W8A8-static has scales"):
        compressed(net(), STATIC, None)


def test_a_layer_without_inputs_stays_dynamic():
    result = compressed(net(), STATIC, batches())
    assert result.model.idle.scheme.name == "W8A8"
    assert result.model.first.scheme.name == "W8A8-static"
    text = "idle has no calibration inputs other than zero: its activations stay dynamic"
    assert text in result.report.warnings
    assert {r.name: r.action for r in result.report.layers} == {
        "first": "W8A8-static",
        "second": "W8A8-static",
        "idle": "W8A8",
    }


@pytest.mark.parametrize("observer", ["minmax", "percentile", "moving_average", "mse"])
@pytest.mark.parametrize("scheme", ["W8A8", "W8A7"])
def test_zero_inputs_stay_dynamic(scheme, observer):
    step = {"scheme": f"{scheme}-static", "observer": observer}
    result = compressed(nn.Sequential(nn.Linear(4, 4)), step, torch.zeros(2, 4))
    assert result.model[0].scheme.name == scheme
    assert "0 has no calibration inputs other than zero: its activations stay dynamic" in result.report.warnings


def test_padding_is_not_observed():
    class Masked(Net):
        def forward(self, x, attention_mask=None):
            return super().forward(x)

    torch.manual_seed(0)
    x = batches(1)[0]
    x[1, 3:] = 1000
    mask = torch.ones(6, 5, dtype=torch.long)
    mask[1, 3:] = 0
    scale = compressed(Masked().eval(), STATIC, {"x": x, "attention_mask": mask}).model.first.input_scale
    assert float(scale) == pytest.approx(float(x[mask.bool()].abs().max()) / 127)


def test_with_algorithms_and_outliers():
    data = batches()
    for batch in data:
        batch[..., 3] *= 50
    step = {**STATIC, "algorithm": "gptq", "outliers": 4, "ignore": ["idle"]}
    result = compressed(net(), step, data).model
    assert isinstance(result.first, OutlierLinear)
    assert result.first.outlier_columns.tolist() == [3]
    rest = torch.cat(data).index_fill(-1, torch.tensor([3]), 0)
    assert float(result.first.rest.input_scale) == pytest.approx(float(rest.abs().max()) / 127)
    model = net()
    assert torch.nn.functional.cosine_similarity(result(data[0]).flatten(), model(data[0]).flatten(), 0) > 0.999


def test_projections_of_torch_attention(tmp_path):
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    steps = [{"attention": "int8", "min_cosine": -1}, STATIC]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        result = tcompress.compress(model, {"steps": steps}, batches(), progress=False).model
    scales = [getattr(result.self_attn, name).input_scale for name in ("q_proj", "k_proj", "v_proj")]
    assert scales[0] == scales[1] == scales[2] != 1


@pytest.mark.parametrize("name", ["W8A8-static", "W8A7-static"])
def test_saved_and_loaded(tmp_path, name):
    data = batches()
    result = compressed(net(), {"scheme": name, "outliers": 1.5}, data).model
    tcompress.save(result, tmp_path / "checkpoint")
    loaded = tcompress.load(tmp_path / "checkpoint", net())
    assert torch.equal(loaded(data[0]), result(data[0]))
    for key, value in result.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value)


def test_a_transformers_model():
    pytest.importorskip("transformers")
    sys.path.insert(0, str(Path(__file__).parent / "integrations"))
    from tiny_models import ids, llama, made

    model = made(llama)
    result = compressed(model, {"scheme": "W8A8-static"}, {"input_ids": ids()})
    assert result.report.output_cosine > 0.99
    layer = result.model.model.layers[0].self_attn
    assert layer.q_proj.input_scale == layer.k_proj.input_scale == layer.v_proj.input_scale
    dynamic = compressed(model, {"scheme": "W8A8"}, {"input_ids": ids()})
    assert result.report.output_cosine < dynamic.report.output_cosine


def test_smooth_searches_by_the_static_error():
    """ "auto" judges by the activations that the recipe has."""
    data = batches()
    for batch in data:
        batch[0, 0] *= 100  # one token: its own scale has it, one for all does not
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    model[0].weight.data[2] = 30
    reports = []
    for scheme in ("W8A8", "W8A8-static"):
        steps = [{"step": "smooth", "alpha": "auto"}, {"scheme": scheme}]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompressionWarning)
            reports.append(tcompress.compress(model, {"steps": steps}, data, progress=False).report.layers[0].reason)
    assert reports[0] != reports[1]
    assert all("alpha" in reason for reason in reports)
