"""The pruning and sparse steps through the front door."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from pruned_models import PRUNE, SPARSE, SPARSE_INT8, W8A8, cosine, masked, mlp, steps, zeroed, zeros
from torch import nn
from torch.nn.utils import prune
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import tcompress
from tcompress import tune
from tcompress.errors import CompressionWarning
from tcompress.nn import QuantizedEmbedding, QuantizedLinear, SparseLinear
from tcompress.prune import magnitude_mask
from tcompress.report.report import Report


@pytest.fixture(autouse=True)
def seconds(monkeypatch, tmp_path):
    """What the measurement finds: sparse layouts are faster, unless a test says otherwise."""
    found = {"dense": 4e-3, "unstructured": 3e-3, "1x4": 3e-3, "8x4": 2e-3, "2:4": 3e-3}
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        tune, "measure", lambda w, kernels, m, dtype: ({k.layout: found[k.layout] for k in kernels}, False)
    )
    return found


# ---- prune, then compress -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("step", [SPARSE, SPARSE_INT8])
def test_prune_and_sparse(step, inplace):
    plain, model, x = mlp(), mlp(), torch.randn(5, 32)
    expected = tcompress.compress(plain, steps(PRUNE)).model
    result = tcompress.compress(model, steps(PRUNE, step), data=x, inplace=inplace)
    for i, layer in zip((0, 2), result.report.compressed, strict=True):
        module = result.model[i]
        assert isinstance(module, SparseLinear)
        assert (module.layout, module.pattern) == ("8x4", "8x4")
        assert layer.action == f"{'float' if step is SPARSE else 'W8A8'} sparse 8x4"
        assert layer.reason == "kernel 8x4, 2.00x dense (2.000 of 4.000 ms, 128 tokens)"
        assert layer.sparsity == zeros(module.packed.dequantize()) >= 0.75
        assert layer.output_sqnr_db is not None
        if step is SPARSE:
            assert torch.equal(module.packed.floats(), expected[i].weight)
    assert result.report.after.disk < (0.4 if step is SPARSE else 0.15) * result.report.before.disk
    assert cosine(result.model(x), expected(x)) > 0.999
    assert result.report.warnings == ()


def test_the_mask_reaches_the_quantized_weight():
    model = mlp()
    result = tcompress.compress(model, steps(PRUNE, W8A8))
    for i, layer in zip((0, 2), result.report.compressed, strict=True):
        module = result.model[i]
        assert isinstance(module, QuantizedLinear)
        mask = magnitude_mask(model[i].weight, "8x4", 0.75)
        linear = copy.deepcopy(model[i])
        linear.weight.data.mul_(mask)
        assert torch.equal(module.weight_packed, QuantizedLinear.from_linear(linear).weight_packed)
        assert (module.weight_packed[~mask] == 0).all()
        assert layer.sparsity >= 0.75
        assert layer.action == "W8A8"


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_or_all_pruned(sparsity):
    recipe = {"steps": [{**PRUNE, "sparsity": sparsity}, {**SPARSE_INT8, "min_sparsity": 0}]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        model = tcompress.compress(mlp(), recipe).model
    x = torch.randn(3, 32)
    if sparsity:
        assert torch.equal(model(x), model[2].bias.expand(3, 16))
    else:
        assert cosine(model(x), mlp()(x)) > 0.999


# ---- models that something else has pruned --------------------------------------------------------------------------


def test_preset_sparse():
    model, x = zeroed(mlp()), torch.randn(5, 32)
    result = tcompress.compress(model, "sparse", data=x)
    assert all(type(result.model[i]) is SparseLinear for i in (0, 2))
    torch.testing.assert_close(result.model(x), model(x), rtol=1e-5, atol=1e-6)
    assert result.report.output_cosine > 0.99999
    with pytest.raises(ValueError, match="0: 0% of its weight is zero, and the step asks for 10%"):
        tcompress.compress(mlp(), "sparse")


def test_preset_sparse_int8_leaves_full_layers_to_the_dense_kernels():
    model = nn.Sequential(nn.Embedding(20, 32), *mlp())
    zeroed(model[1])
    result = tcompress.compress(model, "sparse-int8")
    assert [type(m) for m in result.model] == [QuantizedEmbedding, SparseLinear, nn.Identity, QuantizedLinear]
    ids = torch.arange(20)[None]
    assert cosine(result.model(ids), model(ids)) > 0.999


def test_min_sparsity():
    model = nn.Sequential(zeroed(nn.Linear(32, 32), 0.5), zeroed(nn.Linear(32, 32), 0.9))
    result = tcompress.compress(model, {"steps": [{**SPARSE, "min_sparsity": 0.6}]})
    assert [type(m) for m in result.model] == [nn.Linear, SparseLinear]
    assert [layer.reason for layer in result.report.skipped] == ["50% of its weight is zero, and the step asks for 60%"]


def test_2_4_runs_on_its_kernel(seconds, tmp_path):
    seconds["2:4"] = 1e-3
    model = tcompress.compress(mlp(), steps({"step": "prune", "pattern": "2:4"}, SPARSE_INT8)).model
    assert [m.layout for m in model if isinstance(m, SparseLinear)] == ["2:4", "2:4"]
    tcompress.save(model, tmp_path / "model")
    x = torch.randn(5, 32)
    assert torch.equal(tcompress.load(tmp_path / "model", mlp())(x), model(x))


def test_tokens_reach_the_measurement():
    model = tcompress.compress(zeroed(mlp()), steps(SPARSE, tokens=7)).model
    assert model[0].choice.tokens == 7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    model = zeroed(mlp()).to(dtype)
    result = tcompress.compress(model, "sparse")
    x = torch.randn(5, 32, dtype=dtype)
    assert result.model[0].packed.values.dtype == result.model(x).dtype == dtype
    assert torch.equal(result.model[0].packed.floats(), model[0].weight)
    assert cosine(result.model(x), model(x)) > 0.9999


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("recipe", [steps(SPARSE), steps(SPARSE_INT8), steps(W8A8), steps(PRUNE), steps(PRUNE, SPARSE)])
def test_layers_with_the_hooks_of_torch_prune(recipe, inplace):
    model, x = masked(mlp(), 0.6), torch.randn(5, 32)
    with torch.no_grad():
        model[0].weight_orig.mul_(-2)  # `weight` itself follows at the next call only
        expected = copy.deepcopy(mlp())
        for i in (0, 2):
            expected[i].weight.copy_(model[i].weight_orig * model[i].weight_mask)
            expected[i].bias.copy_(model[i].bias)
    if PRUNE in recipe["steps"]:
        expected = tcompress.compress(expected, steps(PRUNE)).model
    result = tcompress.compress(model, recipe, inplace=inplace, data=x)
    assert (result.model is model) == inplace
    assert cosine(result.model(x), expected(x)) > 0.999
    for i in (0, 2):
        assert not result.model[i]._forward_pre_hooks
        assert not {"weight_orig", "weight_mask"} & set(result.model[i].state_dict())
    if recipe["steps"] == [PRUNE]:
        assert list(dict(result.model.named_parameters())) == ["0.bias", "0.weight", "2.bias", "2.weight"]
        assert torch.equal(result.model[0].weight, expected[0].weight)
    if not inplace:
        assert prune.is_pruned(model)
    assert copy.deepcopy(result.model) is not result.model  # the weights are plain again


def test_bias_masked_by_torch_prune():
    linear = nn.Linear(8, 6)
    prune.l1_unstructured(linear, "weight", 0.5)
    prune.l1_unstructured(linear, "bias", 0.5)
    x, expected = torch.randn(3, 8), linear.bias.clone()
    for recipe in (steps(SPARSE), steps(PRUNE)):
        got = tcompress.compress(linear, recipe).model
        assert torch.equal(got.bias, expected)
        assert got(x).shape == (3, 6)


def test_weights_computed_by_other_hooks_stay():
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(32, 32)), zeroed(nn.Linear(32, 32)))
    result = tcompress.compress(model, "sparse", inplace=True)
    assert [type(m) for m in result.model] == [nn.Linear, SparseLinear]
    assert "hooks" in result.report.skipped[0].reason


# ---- other classes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", [steps(PRUNE), steps(PRUNE, SPARSE), steps(PRUNE, SPARSE_INT8), steps(PRUNE, W8A8)])
@pytest.mark.parametrize("by_torch", [False, True])
def test_conv1d(recipe, by_torch):
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(48, 32))
    if by_torch:
        prune.l1_unstructured(model[0], "weight", 0.1)
    plain = (model[0].weight_orig * model[0].weight_mask if by_torch else model[0].weight).detach()
    pruned = plain * magnitude_mask(plain.t(), "8x4", 0.75).t()
    result = tcompress.compress(model, recipe)
    x = torch.randn(5, 32)
    if recipe["steps"] == [PRUNE]:
        assert type(result.model[0]) is Conv1D
        assert torch.equal(result.model[0].weight, pruned)
    assert cosine(result.model(x), x @ pruned) > 0.999
    (layer,) = result.report.layers
    assert (layer.kind, layer.shape) == ("Conv1D", (48, 32))
    assert layer.sparsity >= 0.75


def test_gpt2(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=16)).eval()
    result = tcompress.compress(model, steps(PRUNE, SPARSE))
    assert sum(isinstance(m, SparseLinear) for m in result.model.modules()) == 4
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    ids = torch.arange(6)[None]
    pruned = tcompress.compress(model, steps(PRUNE)).model
    torch.testing.assert_close(result.model(ids).logits, pruned(ids).logits, rtol=1e-4, atol=1e-5)
    tcompress.save(result.model, tmp_path)
    assert torch.equal(tcompress.load(tmp_path)(ids).logits, result.model(ids).logits)


ATTENTION = {"step": "quantize", "attention": "int12"}


@pytest.mark.parametrize("more", [[], [SPARSE], [SPARSE_INT8], [W8A8]])
@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_torch_attention(tmp_path, more, bias):
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)}).eval()
    result = tcompress.compress(model, {"steps": [PRUNE, *more, ATTENTION]})
    attention = result.model["attention"]
    cls = {str([]): nn.Linear, str([W8A8]): QuantizedLinear}.get(str(more), SparseLinear)
    projections = [attention.get_submodule(name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    names = [layer.name for layer in result.report.compressed]
    assert [type(p) for p in projections] == [cls] * 4
    assert sorted(names) == [f"attention.{name}" for name in ("k_proj", "out_proj", "q_proj", "v_proj")]
    if cls is nn.Linear:
        assert all(zeros(p.weight) == 0.75 for p in projections)
        assert all(p.weight.untyped_storage().nbytes() == p.weight.nbytes for p in projections)  # no views
    x = torch.randn(2, 5, 32)
    got = attention(x, x, x)[0]
    assert torch.isfinite(got).all()
    tcompress.save(result.model, tmp_path)
    fresh = nn.ModuleDict({"attention": nn.MultiheadAttention(32, 4, bias=bias, batch_first=True)}).eval()
    assert torch.equal(tcompress.load(tmp_path, fresh)["attention"](x, x, x)[0], got)


def test_torch_attention_without_an_attention_step():
    model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True).eval()
    result = tcompress.compress(model, steps(PRUNE, SPARSE))
    assert [type(m) for m in (result.model.linear1, result.model.linear2)] == [SparseLinear] * 2
    (skipped,) = result.report.skipped
    assert skipped.name == "self_attn.out_proj"
    assert "MultiheadAttention reads its weight" in skipped.reason
    called = []
    result.model.linear1.register_forward_hook(lambda *args: called.append(1))
    with torch.no_grad():  # torch's fast path would read the weights itself
        assert result.model(torch.randn(2, 3, 32)).shape == (2, 3, 32)
    assert called == [1]


def test_bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    model, ids = BertModel(config).eval(), torch.arange(6)[None]
    pruned = tcompress.compress(model, steps(PRUNE)).model
    result = tcompress.compress(model, steps(PRUNE, SPARSE), data={"input_ids": ids})
    assert sum(isinstance(m, SparseLinear) for m in result.model.modules()) == 7
    expected, got = pruned(ids).last_hidden_state, result.model(ids).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# ---- the report -----------------------------------------------------------------------------------------------------


def test_no_speedup_is_said(seconds):
    seconds["dense"] = 1e-3
    with pytest.warns(CompressionWarning, match="2 of 2 sparse layers run dense: no speedup from this sparsity"):
        result = tcompress.compress(zeroed(mlp()), "sparse")
    assert [m.layout for m in result.model if isinstance(m, SparseLinear)] == ["dense", "dense"]
    assert [layer.reason for layer in result.report.compressed] == ["no speedup from this sparsity"] * 2
    assert result.report.after.disk < result.report.before.disk


def test_the_model_of_costs_promises_no_times(monkeypatch):
    monkeypatch.setenv("TCOMPRESS_TUNE", "0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        report = tcompress.compress(zeroed(mlp(), 0.95), "sparse").report
    allowed = {"no speedup from this sparsity", "kernel 8x4", "kernel unstructured"}
    assert {layer.reason for layer in report.compressed} <= allowed


def test_report():
    recipe = {"steps": [{**PRUNE, "targets": ["0", "2"]}, {**SPARSE, "targets": "0"}, {**W8A8, "targets": "4"}]}
    model = nn.Sequential(*mlp(), nn.ReLU(), nn.Linear(16, 16))
    report = tcompress.compress(model, recipe).report
    text = str(report)
    for part in ("3 layers compressed", "zeros", "75%", "float sparse 8x4", "kernel 8x4", "pruned 8x4", "W8A8"):
        assert part in text, part
    assert Report.from_json(report.to_json()) == report
    assert [type(step).__name__ for step in Report.from_json(report.to_json()).recipe.steps] == [
        "Prune",
        "Sparse",
        "Quantize",
    ]


def test_a_model_that_is_compressed_already():
    model = tcompress.compress(zeroed(mlp()), "sparse").model
    for recipe in ("sparse", "int8", steps(PRUNE)):
        with pytest.raises(ValueError, match="already compressed"):
            tcompress.compress(model, recipe)
