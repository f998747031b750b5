"""Smooth and AWQ as steps of a recipe: exact without a quantization after them, better with it, and honest."""

import pytest
import torch
from paired_models import Block, change, llama, randomized
from test_architectures import bert, gpt2, t5
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.quantize.smoothquant import smooth_scales
from tcompress.recipe import AWQ, Recipe, Smooth


def compress(model, data, *steps):
    return tcompress.compress(model, {"steps": list(steps)}, data=data, progress=False)


class Outliers(nn.Module):
    """Blocks whose norms make some channels large, as those of language models do."""

    def __init__(self, size=32, depth=2):
        super().__init__()
        self.layers = nn.ModuleList(Block(nn.ReLU(), nn.LayerNorm(size), size, 2 * size) for _ in range(depth))
        with torch.no_grad():
            for block in self.layers:
                block.norm.weight[::9] = 25

    def forward(self, x):
        for block in self.layers:
            x = x + block(x)
        return x


@pytest.fixture
def outliers():
    torch.manual_seed(0)
    return randomized(Outliers()), [torch.randn(8, 10, 32) for _ in range(4)]


W8A8, W4 = {"scheme": "W8A8"}, {"scheme": "W4A16-g32"}


@pytest.mark.parametrize("factory", [llama, bert, gpt2, t5], ids=lambda f: f.__name__)
def test_smooth_alone_computes_the_same(factory):
    torch.manual_seed(0)
    model, inputs = factory()
    result = compress(randomized(model), [inputs], {"step": "smooth"})
    assert change(model, result.model, inputs) < 1e-5
    assert all(layer.action == "smooth" for layer in result.report.layers)
    assert result.report.layers


def test_scales_are_those_of_the_formula(outliers):
    model, data = outliers
    result = compress(model, data, {"step": "smooth", "sources": "norm", "alpha": 0.7})
    block = model.layers[0]
    x = torch.cat([block.norm(d) for d in data]).reshape(-1, 32)
    s = smooth_scales(x.abs().amax(0), block.fc1.weight.abs().amax(0), 0.7)
    after = result.model.layers[0]
    torch.testing.assert_close(after.norm.weight, block.norm.weight / s)
    torch.testing.assert_close(after.norm.bias, block.norm.bias / s)
    torch.testing.assert_close(after.fc1.weight, block.fc1.weight * s)
    assert torch.equal(after.fc2.weight, block.fc2.weight)
    assert [layer.name for layer in result.report.layers] == ["layers.0.norm", "layers.1.norm"]


def test_smoothed_int8_is_closer(outliers):
    model, data = outliers
    plain = change(model, compress(model, data, W8A8).model, data[0])
    smooth = change(model, compress(model, data, {"step": "smooth"}, W8A8).model, data[0])
    auto = compress(model, data, {"step": "smooth", "alpha": "auto"}, W8A8)
    assert smooth < 0.7 * plain
    assert change(model, auto.model, data[0]) < 1.1 * smooth
    assert "squared output error -" in auto.report.layers[0].reason


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_awq_is_closer(outliers, algorithm):
    model, data = outliers
    quantize = {**W4, "algorithm": algorithm}
    plain = change(model, compress(model, data, quantize).model, data[0])
    result = compress(model, data, {"step": "awq"}, quantize)
    assert change(model, result.model, data[0]) < (0.9 if algorithm == "rtn" else 1.05) * plain
    actions = [layer.action for layer in result.report.layers]
    assert actions.count("awq") == 4
    assert sum(action.startswith("W4A16-g32") for action in actions) == 4
    assert [layer.action for layer in result.report.prepared] == ["awq"] * 4
    assert str(result.report).splitlines()[0].strip() == "4 layers compressed, 4 prepared or trained, 0 skipped"


class Fed(nn.Module):
    """A norm outside of the blocks, with a reader in each of them."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.blocks = nn.ModuleList(Fed.Block() for _ in range(2))
        with torch.no_grad():
            self.norm.weight[::9] = 25

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(32, 32)

        def forward(self, x, context):
            return x + self.fc(context)

    def forward(self, x):
        context = self.norm(x)
        for block in self.blocks:
            x = block(x, context)
        return x


def test_a_pair_whose_readers_are_in_different_blocks():
    torch.manual_seed(0)
    model, data = randomized(Fed()), [torch.randn(8, 10, 32) for _ in range(4)]
    result = compress(model, data, {"step": "awq"}, W4)
    (line,) = [layer for layer in result.report.layers if layer.action == "awq"]
    assert (line.name, line.reason.rpartition(", into ")[2]) == ("norm", "fc, fc")
    assert change(model, result.model, data[0]) < 0.9 * change(model, compress(model, data, W4).model, data[0])


def test_awq_never_takes_a_ratio_that_is_worse(outliers):
    model, data = outliers
    result = compress(model, data, {"step": "awq"}, W4)
    assert all("error -" in layer.reason for layer in result.report.layers if layer.action == "awq")


def test_only_targets_are_scaled(outliers):
    model, data = outliers
    result = compress(model, data, {"step": "smooth", "targets": "layers.1.*", "sources": "linear"})
    assert [layer.name for layer in result.report.layers] == ["layers.1.fc1"]
    assert torch.equal(result.model.layers[0].fc1.weight, model.layers[0].fc1.weight)


def test_norms_without_a_pair_are_reported():
    torch.manual_seed(0)
    model, inputs = bert()
    with pytest.warns(CompressionWarning):
        report = compress(randomized(model), [inputs], {"step": "smooth"}).report
    note = next(w for w in report.warnings if "added to another tensor" in w)
    assert note.startswith("smooth: embeddings.LayerNorm and ")


def test_nothing_to_scale_is_reported():
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).eval()
    with pytest.warns(CompressionWarning, match="nothing was changed"):
        result = compress(model, [torch.randn(4, 8)], {"step": "smooth"}, W8A8)
    assert result.report.compressed


@pytest.mark.parametrize("step", [{"step": "awq"}, {"step": "smooth", "alpha": "auto"}])
def test_a_search_needs_a_scheme(outliers, step):
    model, data = outliers
    with pytest.raises(ValueError, match=f"{step['step']} without a scheme"):
        compress(model, data, step)


@pytest.mark.parametrize("step", ["awq", "smooth"])
def test_no_data(outliers, step):
    with pytest.raises(ValueError, match="calibration samples"):
        compress(outliers[0], None, {"step": step}, W4)


def test_inplace(outliers):
    model, data = outliers
    weight = model.layers[0].norm.weight
    before = weight.clone()
    result = tcompress.compress(model, {"steps": [{"step": "smooth"}]}, data=data, inplace=True)
    assert result.model is model
    assert not torch.equal(weight, before)


def test_the_original_stays(outliers):
    model, data = outliers
    before = {k: v.clone() for k, v in model.state_dict().items()}
    compress(model, data, {"step": "awq"}, W4)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_recipe_round_trip():
    recipe = Recipe.load({"steps": [{"step": "smooth", "alpha": "auto"}, {"step": "awq", "sources": "norm"}, W4]})
    assert isinstance(recipe.steps[0], Smooth)
    assert isinstance(recipe.steps[1], AWQ)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("alpha", [1.5, "best"])
def test_bad_alpha(alpha):
    with pytest.raises(ValueError, match="alpha"):
        Recipe.load({"steps": [{"step": "smooth", "alpha": alpha}]})
