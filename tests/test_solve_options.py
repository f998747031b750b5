"""What steps with data can be told: through the front door, on a stack of blocks."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from calibrated import statistics_of
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.nn import OutlierLinear, QuantizedEmbedding, QuantizedLinear
from tcompress.quantize import SCHEMES, gptq, hqq, round_to_nearest
from tcompress.quantize.error_propagation import propagated_weight
from tcompress.statistics import InputStatistics

#: Without refining, whose least squares part from those of sums in another order.
GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq", "range": "minmax", "sweeps": 0}
AUTOROUND = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "autoround", "iterations": 40}
RTN = {"step": "quantize", "scheme": "W4A16-g32"}
ARGS = SCHEMES["W4A16-g32"].weights


def compress(model, *steps, data, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        return tcompress.compress(model, {"steps": list(steps), **fields}, data=data)


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 48), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x):
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def stack():
    torch.manual_seed(0)
    model = Stack().eval()
    for parameter in model.parameters():
        parameter.data *= 2
    return model


def samples(n=6):
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(32, 32, generator=generator) / 4
    return [torch.randn(4, 8, 32, generator=generator) @ mix + 0.3 for _ in range(n)]


def weights(model):
    found = []
    for module in model.modules():
        if isinstance(module, OutlierLinear):
            found.append(module.dequantize())
        elif isinstance(module, QuantizedLinear | nn.Linear):
            found.append(module.packed.dequantize() if isinstance(module, QuantizedLinear) else module.weight.detach())
    return found


def assert_alike(model, expected):
    for got, wanted in zip(weights(model), weights(expected), strict=True):
        assert float(((got - wanted).abs() < 1e-4).float().mean()) > 0.97  # sums in another order


@torch.no_grad()
def error(model, original):
    return sum(float((model(x) - original(x)).square().sum()) for x in samples())


@torch.no_grad()
def test_sequential():
    """Gate and up by the block's input, down by what these two give when they are compressed."""
    got = compress(stack(), GPTQ, data=samples(), inputs="sequential").model
    model, x = stack(), torch.cat(samples())
    for block in model.layers:
        for layer in (block.gate, block.up):
            layer.weight.data = gptq(layer.weight, statistics_of(x.flatten(0, 1)), ARGS).dequantize()
        hidden = F.silu(block.gate(x)) * block.up(x)
        block.down.weight.data = gptq(block.down.weight, statistics_of(hidden.flatten(0, 1)), ARGS).dequantize()
        x = block(x)
    assert_alike(got, model)
    plain = compress(stack(), GPTQ, data=samples()).model
    assert not torch.equal(got.layers[0].down.weight_packed, plain.layers[0].down.weight_packed)
    assert torch.equal(got.layers[0].up.weight_packed, plain.layers[0].up.weight_packed)


@torch.no_grad()
def test_propagation():
    got = compress(stack(), {**GPTQ, "propagation": 0.5}, data=samples()).model
    original, model, x = stack(), stack(), torch.cat(samples())
    before = x
    for old, new in zip(original.layers, model.layers, strict=True):

        def solved(layer, x, x0):
            statistics = InputStatistics(x.shape[-1])
            statistics.add(x, x0)
            return gptq(propagated_weight(layer.weight, statistics, 0.5), statistics, ARGS).dequantize()

        inner, inner0 = (F.silu(b.gate(v)) * b.up(v) for b, v in ((new, x), (old, before)))
        down = solved(new.down, inner, inner0)
        for layer in (new.gate, new.up):
            layer.weight.data = solved(layer, x, before)
        new.down.weight.data = down
        x, before = new(x), old(before)
    assert_alike(got, model)
    with pytest.raises(ValueError, match="Recipe: the dict: inputs: got 'original', expected 'compressed'"):
        compress(stack(), {**GPTQ, "propagation": 0.5}, data=samples(), inputs="original")


@pytest.mark.parametrize("start", ["rtn", "gptq"])
@pytest.mark.parametrize("inputs", ["compressed", "sequential", "original"])
def test_autoround(start, inputs):
    model = stack()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, {**AUTOROUND, "start": start}, data=samples(), inputs=inputs)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert all(p.requires_grad for p in model.parameters())
    assert {r.action for r in result.report.layers} == {"W4A16-g32 autoround"}
    rtn = compress(model, {**RTN, "range": "mse"}, data=samples()).model
    if inputs == "original":  # whose errors add up: only the first block is compared
        model.layers, rtn.layers, result.model.layers = (m.layers[:1] for m in (model, rtn, result.model))
    assert error(result.model, model) < 0.9 * error(rtn, model)
    if inputs == "compressed":
        again = compress(model, {**AUTOROUND, "start": start}, data=samples()).model
        assert all(torch.equal(a, b) for a, b in zip(weights(result.model), weights(again), strict=True))


def test_autoround_beside_gptq_and_rtn():
    """Down is learned on top of what the others became."""
    steps = [{**AUTOROUND, "targets": "down"}, {**GPTQ, "targets": "gate"}, RTN]
    model = compress(stack(), *steps, data=samples()).model
    alone = compress(stack(), {**GPTQ, "targets": "gate"}, {**RTN, "targets": "up"}, data=samples()).model
    assert torch.equal(model.layers[0].gate.weight_packed, alone.layers[0].gate.weight_packed)
    assert error(model, stack()) < error(compress(stack(), RTN, data=samples()).model, stack())


def test_autoround_needs_a_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    result = compress(model, AUTOROUND, data=samples())
    assert any("0 stands in no block, by which autoround learns: rtn instead" in w for w in result.report.warnings)


def test_autoround_of_a_decoder_with_a_cache():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=96, pad_token_id=0, use_cache=True, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    data = [{"input_ids": torch.randint(3, 90, (4, 16))} for _ in range(4)]
    rtn = compress(model, RTN, data=data).model
    learned = compress(model, {**AUTOROUND, "iterations": 30}, data=data).model
    with torch.no_grad():
        errors = [sum(float((m(**b).logits - model(**b).logits).norm()) for b in data) for m in (rtn, learned)]
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize("algorithm", ["rtn", "hqq", "gptq"])
def test_bias_correction(algorithm):
    step = {**RTN, "scheme": "W4A16", "algorithm": algorithm, "bias_correction": True}
    model = stack()
    result = compress(model, step, data=samples())
    plain = compress(model, {k: v for k, v in step.items() if k != "bias_correction"}, data=samples())
    means = []
    with torch.no_grad():
        for m in (model, result.model, plain.model):
            means.append(torch.cat([m.layers[0].gate(x).flatten(0, 1) for x in samples()]).mean(0))
    assert float((means[1] - means[0]).abs().max()) < 1e-4
    assert float((means[2] - means[0]).abs().max()) > 1e-3
    assert torch.equal(result.model.layers[0].gate.weight_packed, plain.model.layers[0].gate.weight_packed)


def test_bias_correction_without_a_bias():
    model = stack()
    for layer in model.layers:
        layer.down = nn.Linear(48, 32, bias=False)
    result = compress(model, {**RTN, "bias_correction": True}, data=samples())
    assert "3 of 9 layers have no bias to correct" in result.report.warnings
    assert result.model.layers[0].down.bias is None


def test_outliers_in_a_chain(tmp_path):
    model, data = stack(), [x.clone() for x in samples()]
    for x in data:
        x[..., 5] = 30
    step = {"step": "quantize", "scheme": "W8A8", "algorithm": "gptq", "outliers": 4}
    result = compress(model, step, data=data)
    layer = result.model.layers[0].gate
    assert isinstance(layer, OutlierLinear)
    assert 5 in layer.outlier_columns.tolist()
    assert torch.equal(layer.outlier_weight, model.layers[0].gate.weight[:, layer.outlier_columns])
    plain = compress(model, {**step, "outliers": None}, data=data).model
    with torch.no_grad():
        errors = [sum(float((m(x) - model(x)).norm()) for x in data) for m in (result.model, plain)]
    assert errors[0] < 0.5 * errors[1]
    tcompress.save(result.model, tmp_path / "saved")
    same = tcompress.load(tmp_path / "saved", model=stack())
    with torch.inference_mode():
        assert torch.equal(same(data[0]), result.model(data[0]))


def test_hqq_and_ranges_need_no_data():
    for step, expected in (
        ({**RTN, "algorithm": "hqq"}, lambda w: hqq(w, ARGS)),
        ({**RTN, "range": "mse"}, lambda w: round_to_nearest(w, ARGS, range="mse")),
        ({**RTN, "range": "percentile"}, lambda w: round_to_nearest(w, ARGS, range="percentile")),
    ):
        model = stack()
        result = tcompress.compress(model, {"steps": [step]})
        assert torch.equal(result.model.layers[1].up.weight_packed, expected(model.layers[1].up.weight).qdata)


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16-g32", "W4A16-g32-asym"])
@pytest.mark.parametrize("step", [{}, {"algorithm": "hqq"}, {"range": "mse"}])
def test_embeddings_of_four_bits(tmp_path, scheme, step):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 64)).eval()
    recipe = {"steps": [{"step": "quantize", "scheme": scheme, "targets": "Embedding", **step}]}
    result = tcompress.compress(model, recipe)
    table = result.model[0]
    assert isinstance(table, QuantizedEmbedding)
    assert table.packed.qdata.shape == (50, 32)
    ids = torch.tensor([[3, 49], [0, 3]])
    torch.testing.assert_close(table(ids), table.packed.dequantize()[ids])
    relative = float((table(ids) - model[0](ids)).norm() / model[0](ids).norm())
    assert relative < (0.17 if scheme == "W4A16" else 0.13)
    tcompress.save(result.model, tmp_path / "saved")
    same = tcompress.load(tmp_path / "saved", model=copy.deepcopy(model))
    assert torch.equal(same(ids), result.model(ids))


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ({**RTN, "sweeps": 1}, r"got sweeps with rtn, expected only \['range'\] with it"),
        ({**RTN, "algorithm": "hqq", "range": "mse"}, "got range with hqq, expected only no options with it"),
        ({**AUTOROUND, "outliers": 4}, "got autoround with bias_correction or outliers, expected rtn, hqq or gptq"),
        ({"step": "quantize", "attention": "int8", "bias_correction": True}, "got attention with bias_correction"),
        ({**GPTQ, "propagation": 2}, "less than or equal to 1"),
    ],
)
def test_options_of_another_algorithm(step, text):
    with pytest.raises(ValueError, match=text):
        tcompress.Recipe.load({"steps": [step]})


@pytest.mark.parametrize("step", [{**RTN, "bias_correction": True}, {**RTN, "outliers": 4}])
def test_without_data(step):
    with pytest.raises(ValueError, match="quantize: bias_correction or outliers decides by the inputs of layers"):
        tcompress.compress(stack(), {"steps": [step]})
