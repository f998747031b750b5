"""Sharing through the front door: what is tied stays tied, what is smaller is smaller, and a checkpoint keeps both."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.nn import CodebookLinear, LowRankLinear, QuantizedLinear
from tcompress.report.size import model_sizes
from tcompress.share import kmeans_codebook, low_rank_factors

sys.path.insert(0, str(Path(__file__).parents[1] / "integrations"))
from tiny_models import bert, gpt2, ids, llama, made

DATA = {"input_ids": ids(4, 16)}
W8A8 = {"step": "quantize", "scheme": "W8A8"}
CODEBOOK, LOW_RANK = {"step": "codebook"}, {"step": "low_rank", "ratio": 0.6}


def compress(model, *steps, data=DATA, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        return tcompress.compress(model, {"steps": list(steps), **fields}, data)


def round_trip(result, tmp_path):
    model = result.model
    loaded = tcompress.load(tcompress.save(model, tmp_path))
    with torch.no_grad():
        assert torch.equal(loaded(**DATA)[0], model(**DATA)[0])
    state, again = model.state_dict(), loaded.state_dict()
    assert state.keys() == again.keys()
    assert all(torch.equal(again[k], v) and again[k].dtype == v.dtype for k, v in state.items())
    assert model_sizes(loaded).disk == result.report.after.disk
    (tensors,) = tmp_path.glob("*.safetensors")
    header = int.from_bytes(tensors.read_bytes()[:8], "little") + 8
    assert tensors.stat().st_size - header == result.report.after.disk  # each tensor once, none missing
    return loaded


@pytest.mark.parametrize("factory", [llama, bert, gpt2])
@pytest.mark.parametrize("options", [{}, {"held": "indices", "rows": None, "bits": 3, "weighting": "inputs"}])
def test_codebooks(factory, options, tmp_path):
    result = compress(made(factory), {**CODEBOOK, **options})
    layers = [m for m in result.model.modules() if isinstance(m, CodebookLinear)]
    assert layers
    assert all(f"codebook {options.get('bits', 4)} bit" == x.action for x in result.report.compressed)
    assert result.report.output_cosine > (0.85 if not options else 0.5)
    loaded = round_trip(result, tmp_path)
    for layer in layers:
        assert layer.held == options.get("held", "float")
        assert (layer.looked_up is None) == (layer.held == "indices")
    assert model_sizes(loaded).resident == result.report.after.resident


def test_a_codebook_layer_is_what_k_means_found():
    model = nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 6)).eval()
    x = torch.randn(5, 20)
    got = compress(model, {**CODEBOOK, "bits": 3}, data=None).model
    first = kmeans_codebook(model[0].weight, 3, 1)
    assert torch.equal(got[0].packed.indices, first.indices)
    hidden = torch.relu(torch.nn.functional.linear(x, first.dequantize(torch.float32), model[0].bias))
    second = kmeans_codebook(model[2].weight, 3, 1).dequantize(torch.float32)
    torch.testing.assert_close(got(x), torch.nn.functional.linear(hidden, second, model[2].bias))


def test_weighting_by_inputs_lowers_the_error_of_the_output():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16)).eval()
    with torch.no_grad():
        model[0].weight[:, :8] *= 0.2
    x = torch.randn(512, 32) * torch.cat([torch.full((8,), 20.0), torch.ones(24)])
    error = {}
    for weighting in ("none", "inputs"):
        got = compress(model, {**CODEBOOK, "bits": 3, "weighting": weighting}, data=x).model
        error[weighting] = (got(x) - model(x)).norm().item()
    assert error["inputs"] < 0.95 * error["none"]


@pytest.mark.parametrize("held", ["float", "indices"])
def test_the_module(held):
    w = torch.randn(9, 13)
    layer = CodebookLinear.from_codebook(kmeans_codebook(w, 3, 2, 5), torch.ones(9), torch.float32, held)
    x = torch.randn(4, 13)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    empty = CodebookLinear(13, 9, True, 3, 2, 5, held)
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))
    codebook = layer.weight_codebook
    half = layer.bfloat16()
    assert half(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(half.weight_codebook, codebook)


@pytest.mark.parametrize("factory", [llama, bert, gpt2])
@pytest.mark.parametrize("step", [LOW_RANK, {**LOW_RANK, "whitening": "none"}])
def test_low_rank(factory, step, tmp_path):
    model = made(factory)
    result = compress(model, step)
    for name, module in result.model.named_modules():
        if isinstance(module, LowRankLinear):
            n, k = module.out_features, module.in_features
            assert module.rank * (n + k) <= 0.6 * n * k < (module.rank + 1) * (n + k)
            assert model.get_submodule(name).weight.numel() == n * k
    assert result.report.after.disk < result.report.before.disk
    round_trip(result, tmp_path)


def test_low_rank_by_inputs_is_nearer():
    data = [{"input_ids": ids(4, 16, seed=s)} for s in range(4)]
    plain, by_inputs = (
        compress(made(bert), {**LOW_RANK, "whitening": w}, data=data).report.output_cosine for w in ("none", "inputs")
    )
    assert by_inputs > plain


def test_low_rank_sees_the_blocks_before():
    """The second layer is factored on what the first gives after its own factors took its place."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(2))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Chain().eval(), torch.randn(300, 16)
    got = compress(model, {"step": "low_rank", "ratio": 0.5}, data=x).model
    hidden = got.blocks[0](x).detach()
    b, a = low_rank_factors(model.blocks[1][0].weight, 4, 2 / 300 * hidden.T @ hidden)
    torch.testing.assert_close(got.blocks[1][0].weight, b @ a, atol=1e-4, rtol=1e-3)


def test_low_rank_then_int8(tmp_path):
    result = compress(made(bert), LOW_RANK, W8A8)
    kinds = {type(m.reduce) for m in result.model.modules() if isinstance(m, LowRankLinear)}
    assert kinds == {QuantizedLinear}
    round_trip(result, tmp_path)


def linears(block):
    return [m for m in block.modules() if hasattr(m, "weight") and m.weight.dim() == 2]


@pytest.mark.parametrize(
    ("factory", "path"), [(llama, "model.layers"), (bert, "encoder.layer"), (gpt2, "transformer.h")]
)
def test_layers_share(factory, path, tmp_path):
    count = {"num_hidden_layers": 5} if factory is not gpt2 else {"n_layer": 5}
    model = made(factory, **count)
    result = compress(model, {"step": "share"})
    own, old = (list(m.get_submodule(path)) for m in (result.model, model))
    for first, second in ((0, 1), (2, 3)):
        parts = (linears(blocks[i]) for blocks in (own, old) for i in (first, second))
        for a, b, x, y in zip(*parts, strict=True):
            assert a.weight is b.weight
            torch.testing.assert_close(a.weight, (x.weight + y.weight) / 2)
    assert all(a.weight is not b.weight for a, b in zip(linears(own[2]), linears(own[4]), strict=True))
    assert "last 1 of 5" in result.report.skipped[0].reason
    loaded = list(round_trip(result, tmp_path).get_submodule(path))
    assert all(a.weight is b.weight for a, b in zip(linears(loaded[0]), linears(loaded[1]), strict=True))
    if factory is llama:
        prompt = ids(1, 6)
        cached = result.model.generate(prompt, max_new_tokens=4, do_sample=False)
        assert torch.equal(cached, result.model.generate(prompt, max_new_tokens=4, do_sample=False, use_cache=False))


@pytest.mark.parametrize(
    "second", [W8A8, CODEBOOK, LOW_RANK, {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq"}]
)
def test_tied_layers_have_one_packed_weight(second, tmp_path):
    alone = compress(made(bert), second)
    result = compress(made(bert), {"step": "share", "init": "best"}, second)
    saved = sum(x.bytes_before for x in alone.report.compressed), sum(x.bytes_after for x in alone.report.compressed)
    # Of two blocks one set of weights is left; biases and what is not linear stay.
    assert result.report.after.disk < alone.report.after.disk - 0.4 * saved[1]
    loaded = round_trip(result, tmp_path)
    first, other = (loaded.encoder.layer[i].intermediate.dense for i in (0, 1))
    if isinstance(first, QuantizedLinear):
        assert first.held_kernel is None or first.kernel_weight is other.kernel_weight
    elif isinstance(first, CodebookLinear):
        assert first.weight_indices.data_ptr() == other.weight_indices.data_ptr()
    else:
        assert first.reduce.weight is other.reduce.weight


def test_the_best_start_is_the_one_that_costs_least():
    model = made(bert)
    with torch.no_grad():  # the second block does next to nothing, so the first one's weights must go
        for m in linears(model.encoder.layer[1]):
            m.weight.mul_(0.3)
    model.requires_grad_(False)
    expected = model(**DATA)[0]
    errors = {init: compress(model, {"step": "share", "init": init}) for init in ("mean", "best")}
    costs = {k: float((r.model(**DATA)[0] - expected).square().sum()) for k, r in errors.items()}
    by_hand = []
    for which in (0, 1):
        trial = made(bert)
        trial.load_state_dict(model.state_dict())
        trial.requires_grad_(False)
        for a, b in zip(linears(trial.encoder.layer[0]), linears(trial.encoder.layer[1]), strict=True):
            a.weight = b.weight = (a, b)[which].weight
            a.bias = b.bias = (a, b)[which].bias
        by_hand.append(float((trial.eval()(**DATA)[0] - expected).square().sum()))
    assert costs["best"] == pytest.approx(min(costs["mean"], *by_hand), rel=1e-4)


def test_embeddings_are_tied(tmp_path):
    model = made(llama, tie_word_embeddings=False)
    result = compress(model, {"step": "share", "structure": "embeddings"})
    got = result.model
    assert got.lm_head.weight is got.model.embed_tokens.weight
    torch.testing.assert_close(got.lm_head.weight, (model.lm_head.weight + model.model.embed_tokens.weight) / 2)
    assert got.config.tie_word_embeddings
    loaded = round_trip(result, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    again = compress(got, {"step": "share", "structure": "embeddings"})
    assert again.report.skipped[0].reason == "tied already"


def test_what_there_is_nothing_to_share():
    for model in (nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), made(bert, num_hidden_layers=1)):
        data = torch.randn(3, 4) if isinstance(model, nn.Sequential) else DATA
        for structure in ("layers", "embeddings"):
            result = compress(model, {"step": "share", "structure": structure}, data=data)
            assert any("nothing was tied" in w for w in result.report.warnings)


@pytest.mark.parametrize("step", [{"step": "share", "init": "best"}, LOW_RANK, {**CODEBOOK, "weighting": "inputs"}])
def test_what_needs_data(step):
    with pytest.raises(ValueError, match="data: got none"):
        compress(made(bert), step, data=None)


@pytest.mark.parametrize(
    "step",
    [{**CODEBOOK, "bits": 9}, {**CODEBOOK, "rows": 0}, {"step": "low_rank", "ratio": 1}, {"step": "share", "group": 1}],
)
def test_steps_that_make_no_sense(step):
    with pytest.raises(ValueError, match="got .*expected"):
        compress(made(bert), step)
