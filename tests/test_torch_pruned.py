"""Models that `torch.nn.utils.prune` still masks."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import tcompress


def masked_linear():
    torch.manual_seed(0)
    layer = nn.Linear(64, 32)
    prune.random_unstructured(layer, "weight", 0.5)
    prune.random_unstructured(layer, "bias", 0.5)
    return layer


def new_values(layer):
    """As after `load_state_dict` or an optimizer's step: the attributes are those of the last call."""
    with torch.no_grad():
        layer.weight_orig.mul_(2)
        layer.bias_orig.add_(1)


@pytest.mark.parametrize(
    "recipe",
    ["sparse", "sparse-int8", "int8", {"steps": [{"step": "prune", "pattern": "unstructured", "sparsity": 0.6}]}],
    ids=str,
)
def test_weight_and_bias_are_those_of_now(recipe):
    model = nn.Sequential(masked_linear())
    x = torch.randn(8, 64)
    model(x)
    new_values(model[0])
    got = tcompress.compress(model, recipe, data=x).model(x)
    expected = model(x)
    if isinstance(recipe, str):
        assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.999
    assert (got - expected).mean(0).abs().max() < 0.5  # a bias of before would be off by 1 in every token


@pytest.mark.parametrize(
    "from_linear", [tcompress.nn.SparseLinear.from_linear, tcompress.nn.QuantizedLinear.from_linear]
)
def test_a_layer_by_itself(from_linear):
    layer = masked_linear()
    new_values(layer)
    module = from_linear(layer)
    x = torch.randn(4, 64)
    expected = layer(x)
    assert (module(x) - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("preset", ["sparse", "sparse-int8"])
def test_an_encoder_masked_everywhere(preset):
    """The projection of its attention too, whose weight attention reads without a call."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.5)
    x = torch.randn(2, 9, 32)
    expected = model(x)
    got = tcompress.compress(model, preset, data=x).model(x)
    assert torch.nn.functional.cosine_similarity(got, expected, dim=-1).min() > 0.999
    assert torch.equal(model(x), expected)
