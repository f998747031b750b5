"""Recipes with a ratio a layer."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.recipe import Recipe

STEP = {"pattern": "unstructured", "sparsity": 0.5}


class Net(nn.Module):
    """Layers of weights of different size, and of a different say in the output."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            self.b.weight.mul_(0.2)

    def forward(self, x):
        return self.c(F.relu(self.a(x))) + 0.01 * self.b(x)


@pytest.fixture
def net():
    return Net().eval()


DATA = [torch.randn(64, 32, generator=torch.Generator().manual_seed(s)) for s in range(3)]


def zeros(model):
    return torch.cat([m.weight.flatten() == 0 for m in model.modules() if isinstance(m, nn.Linear)])


def prune(model, recipe, data=None):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)  # there are no blocks
        return tcompress.compress(model, recipe, data).model


def test_by_magnitude_it_is_one_threshold(net):
    weights = torch.cat([m.weight.detach().flatten() for m in (net.a, net.b, net.c)])
    expected = weights.abs() <= weights.abs().sort().values[len(weights) // 2 - 1]
    recipe = tcompress.global_ratios(net, STEP, most=1.0)
    assert torch.equal(zeros(prune(net, recipe)), expected)
    assert torch.equal(zeros(prune(net, {"steps": [{"step": "prune", "scope": "model", **STEP}]})), expected)
    assert Recipe.load(recipe.model_dump()) == recipe
    assert recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize("pattern", ["8x4", "1x4"])
def test_of_blocks(net, pattern):
    got = prune(net, {"steps": [{"step": "prune", "scope": "model", "pattern": pattern, "sparsity": 0.5}]})
    by_layer = [float((m.weight == 0).float().mean()) for m in (got.a, got.b, got.c)]
    assert by_layer[1] > 0.9 > max(by_layer[0], by_layer[2])
    assert sum(by_layer) == pytest.approx(1.5, abs=0.02)


@pytest.mark.parametrize("algorithm", ["wanda", "sparsegpt"])
def test_by_inputs(net, algorithm):
    before = copy.deepcopy(net.state_dict())
    data = [x * torch.cat([torch.full((16,), 1e-3), torch.ones(16)]) for x in DATA]
    recipe = tcompress.global_ratios(net, {**STEP, "algorithm": algorithm}, data)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    found = {step.targets[0]: step.sparsity for step in recipe.steps}
    assert found["re:b$"] == max(found.values())
    assert sum(found.values()) == pytest.approx(1.5, abs=0.01)
    assert found["re:a$"] > found["re:c$"]  # half of its inputs are next to nothing
    got = prune(net, recipe, data)
    assert float(zeros(got).float().mean()) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize("sensitivity", ["layer", "output"])
def test_the_search_spends_the_budget(net, algorithm, sensitivity):
    step = {**STEP, "algorithm": algorithm}
    recipe = tcompress.search_ratios(net, step, DATA, sensitivity=sensitivity)
    got = prune(net, recipe, DATA)
    assert float(zeros(got).float().mean()) == pytest.approx(0.5, abs=0.01)
    if sensitivity == "output":  # what says little in the output goes first
        assert float((got.b.weight == 0).float().mean()) == pytest.approx(0.8, abs=0.02)
        alike = prune(net, {"steps": [{"step": "prune", **step}]}, DATA)
        error = [sum(float((m(x) - net(x)).square().sum().detach()) for x in DATA) for m in (got, alike)]
        assert error[0] < error[1]


def test_layers_with_one_weight_count_once(net):
    net.c.weight = net.a.weight
    recipe = tcompress.global_ratios(net, STEP)
    names = {frozenset(step.targets) for step in recipe.steps}
    assert frozenset({"re:a$", "re:c$"}) in names


def test_a_budget_that_cannot_be_met(net):
    with pytest.raises(ValueError, match="got 0.5, expected 0 to 0.3"):
        tcompress.search_ratios(net, STEP, DATA, ratios=(0, 0.3))


@pytest.mark.parametrize(
    ("step", "data", "problem"),
    [
        ({"pattern": "2:4"}, DATA, "step"),
        ({**STEP, "targets": ["nothing"]}, DATA, "match nothing"),
        ({**STEP, "algorithm": "wanda"}, None, "data: got none"),
        ({**STEP, "sparsity": 0.0}, DATA, "more than nothing"),
    ],
)
def test_errors(net, step, data, problem):
    with pytest.raises(ValueError, match=problem):
        tcompress.global_ratios(net, step, data)


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.a, self.b = nn.Embedding(50, 8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, input_ids):
        assert input_ids.shape[1] <= 6
        return self.b(F.relu(self.a(self.embedding(input_ids))))


def tokenizer(text, return_tensors, verbose):
    return {"input_ids": torch.tensor([[ord(letter) % 50 for letter in text]], dtype=torch.long)}


def by_mixed_precision(model, step, data, **options):
    return tcompress.mixed_precision(model, data, bits_per_weight=10, schemes=("W4A16-g32", "W8A8"), **options).recipe


@pytest.mark.parametrize("function", [tcompress.global_ratios, tcompress.search_ratios, by_mixed_precision])
def test_of_text(function):
    model, step = Language().eval(), {**STEP, "algorithm": "wanda"}
    with pytest.warns(CompressionWarning, match="2 of 3 calibration samples clipped to 6 tokens") as warned:
        recipe = function(model, step, ["some text", "text", "a long text"], tokenizer=tokenizer, max_length=6)
    ids = [tokenizer(text, "pt", False) for text in ("some t", "text", "a long")]
    assert recipe == function(model, step, ids)
    assert {str(w.message).partition(":")[0] for w in warned} <= {"global_ratios", "search_ratios", "mixed_precision"}
    with pytest.raises(TypeError, match="got text, expected tensors, or text and tokenizer="):
        function(model, step, ["text"])


def test_an_unknown_sensitivity():
    with pytest.raises(ValueError, match="search_ratios: sensitivity: got 'outputs', expected 'layer' or 'output'"):
        tcompress.search_ratios(nn.Sequential(nn.Linear(32, 32)), STEP, torch.randn(4, 32), sensitivity="outputs")


@pytest.mark.parametrize("step", [{**STEP, "algorithm": "wanda"}, {"pattern": "2:4"}])
def test_what_cannot_be_ranked(step):
    with pytest.raises(ValueError, match="scope: got 'model' with"):
        Recipe.load({"steps": [{"step": "prune", "scope": "model", **step}]})
