"""Models that `torch.nn.utils.prune` still masks."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
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


@pytest.mark.parametrize(
    "step",
    [
        {"step": "smooth"},
        {"step": "rotate"},
        {"step": "low_rank", "ratio": 0.5},
        {"step": "codebook"},
        {"step": "shrink", "structure": "layers", "ratio": 0.5},
    ],
    ids=lambda step: step["step"],
)
@pytest.mark.filterwarnings("ignore::tcompress.errors.CompressionWarning")
def test_a_model_is_copied_after_a_call(step):
    """The weights of the last call have a gradient's history, which `copy.deepcopy` refuses."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 48}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(num_hidden_layers=2, **sizes)).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            prune.l1_unstructured(module, "weight", 0.3)
    ids = torch.randint(3, 40, (2, 8))
    expected = model(input_ids=ids).logits
    assert model.lm_head.weight.grad_fn is not None
    changed = tcompress.compress(model, {"steps": [step]}, data=[{"input_ids": ids}]).model
    assert changed is not model
    assert changed(input_ids=ids).logits.isfinite().all()
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_a_student_of_a_masked_model():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    teacher = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    prune.l1_unstructured(teacher.layers[2].linear1, "weight", 0.5)
    x = torch.randn(2, 5, 16)
    teacher(x)
    student = tcompress.student_of(teacher, x, layers=[0, 2])
    assert torch.equal(student.layers[1].linear1.weight_mask, teacher.layers[2].linear1.weight_mask)


def test_weights_that_a_hook_computes_are_named():
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    x = torch.randn(4, 8)
    model(x)
    with pytest.raises(ValueError, match=r"compress: model: got a model that cannot be copied .*; or pass inplace"):
        tcompress.compress(model, {"steps": [{"step": "low_rank", "ratio": 0.5}]}, data=x)
    with pytest.raises(
        ValueError, match=r"student_of: teacher: got a model that cannot be .*plain \(remove_weight_norm"
    ):
        tcompress.student_of(model, x, every=2)
