"""Algorithms with data, through the front door."""

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
from tcompress import solve
from tcompress.errors import CompressionWarning
from tcompress.nn import QuantizedLinear, SparseLinear
from tcompress.prune import sparsegpt, wanda_mask
from tcompress.quantize import SCHEMES, gptq

#: The paper's; the defaults' least squares would part by more than the last digits what sums in another order begin.
GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq", "range": "minmax", "sweeps": 0}
WANDA = {"step": "prune", "pattern": "unstructured", "sparsity": 0.5, "algorithm": "wanda"}
SPARSEGPT = {**WANDA, "algorithm": "sparsegpt"}


def compress(model, *steps, data, **fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        return tcompress.compress(model, {"steps": list(steps), **fields}, data=data)


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.down = nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


class Stack(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        self.embed = nn.Linear(32, 32)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack():
    torch.manual_seed(0)
    return Stack().eval()


def samples(n=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(32, 32, generator=generator) / 4
    return [torch.randn(4, 8, 32, generator=generator) @ mix for _ in range(n)]


def weights(model):
    return [(m.packed.dequantize() if isinstance(m, QuantizedLinear) else m.weight.detach()) for m in model.modules()
            if isinstance(m, nn.Linear | QuantizedLinear)]  # fmt: skip


def by_hand(model, solve):
    """Layer by layer as documented: a block's inputs from the solved blocks before it, the layers outside last."""
    model, x = copy.deepcopy(model), torch.cat(samples())
    with torch.no_grad():
        whole = x
        x = model.embed(x)
        for block in model.layers:
            hidden = F.relu(block.up(x))
            solve(block.up, x), solve(block.down, hidden)
            x = block(x)
        solve(model.embed, whole), solve(model.head, x)
    return model


def solve_gptq(layer, x):
    packed = gptq(layer.weight, statistics_of(x.flatten(0, -2)), SCHEMES["W4A16-g32"].weights)
    layer.weight.data = packed.dequantize()


def solve_wanda(layer, x):
    layer.weight.data *= wanda_mask(layer.weight, statistics_of(x.flatten(0, -2)), "unstructured", 0.5)


def solve_sparsegpt(layer, x):
    layer.weight.data = sparsegpt(layer.weight, statistics_of(x.flatten(0, -2)), "unstructured", 0.5).weight


def solve_both(layer, x):
    args = SCHEMES["W4A16-g32"].weights
    layer.weight.data = sparsegpt(layer.weight, statistics_of(x.flatten(0, -2)), "unstructured", 0.5, args).weight


@pytest.mark.parametrize(
    ("steps", "by"),
    [
        ([GPTQ], solve_gptq),
        ([WANDA], solve_wanda),
        ([SPARSEGPT], solve_sparsegpt),
        ([SPARSEGPT, GPTQ], solve_both),
    ],
)
def test_block_by_block_as_documented(steps, by):
    model = stack()
    before = copy.deepcopy(model.state_dict())
    result = compress(model, *steps, data=samples())
    assert not result.report.warnings
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    for got, expected in zip(weights(result.model), weights(by_hand(model, by)), strict=True):
        assert float(((got - expected).abs() < 1e-4).float().mean()) > 0.97  # sums in another order
    assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_the_report_names_the_algorithm():
    assert {r.action for r in compress(stack(), GPTQ, data=samples()).report.layers} == {"W4A16-g32 gptq"}
    (action,) = {r.action for r in compress(stack(), WANDA, data=samples()).report.layers}
    assert action == "pruned unstructured wanda"


def test_twice_the_same_and_in_place():
    one, other = (compress(stack(), SPARSEGPT, GPTQ, data=samples()).model for _ in range(2))
    model = stack()
    result = tcompress.compress(model, {"steps": [SPARSEGPT, GPTQ]}, data=samples(), inplace=True)
    assert result.model is model
    for a, b, c in zip(weights(one), weights(other), weights(model), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_inputs_of_the_original_model():
    original = compress(stack(), GPTQ, data=samples(), inputs="original").model
    compressed = compress(stack(), GPTQ, data=samples()).model
    for name in ("up", "down"):
        first = [getattr(m.layers[0], name).weight_packed for m in (original, compressed)]
        last = [getattr(m.layers[2], name).weight_packed for m in (original, compressed)]
        assert torch.equal(*first)
        assert not torch.equal(*last)


def test_a_sparse_step_after_sparsegpt():
    step = {"step": "sparse", "scheme": "W8A8", "tokens": 4}
    model = compress(stack(), {**SPARSEGPT, "pattern": "8x4"}, step, data=samples()).model
    layer = model.layers[0].up
    assert isinstance(layer, SparseLinear)
    expected = compress(stack(), {**SPARSEGPT, "pattern": "8x4"}, data=samples()).model.layers[0].up.weight
    assert torch.equal(layer.packed.dequantize() == 0, expected == 0) or layer.layout == "dense"


def test_rounding_to_nearest_beside_gptq():
    """Other steps' layers are compressed in the same order, so that the blocks after them see that too."""
    rtn = {"step": "quantize", "scheme": "W4A16", "targets": "up"}
    model = compress(stack(), rtn, {**GPTQ, "targets": "down"}, data=samples()).model
    alone = compress(stack(), {"step": "quantize", "scheme": "W4A16", "targets": "up"}, data=samples()).model
    assert torch.equal(model.layers[1].up.weight_packed, alone.layers[1].up.weight_packed)
    assert model.layers[1].down.scheme.name == "W4A16-g32"


@pytest.mark.parametrize("step", [GPTQ, WANDA, SPARSEGPT])
def test_without_data(step):
    model = stack()
    with pytest.raises(ValueError, match=rf"compress: data: got none, expected calibration samples; {step['step']}: "):
        tcompress.compress(model, {"steps": [step]}, inplace=True)
    assert type(model.head) is nn.Linear


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_finite_or_empty(bad):
    data = samples()
    spoiled = [data[0], torch.full((1, 8, 32), bad), *data[1:], torch.zeros(0, 8, 32)]
    expected = compress(stack(), GPTQ, data=data)
    result = compress(stack(), GPTQ, data=spoiled)
    assert result.report.warnings == ("2 of 8 calibration samples left out: empty, or with NaN or infinity",)
    for a, b in zip(weights(expected.model), weights(result.model), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="compress: data: got 1 samples that are empty or hold NaN or infinity"):
        tcompress.compress(stack(), {"steps": [GPTQ]}, data=spoiled[1])


def test_tokens_that_a_layer_makes_infinite():
    data = samples()
    data[2] = data[2].clone()
    data[2][0, 0] = 1e38  # finite, and infinite after the first layer
    result = compress(stack(), GPTQ, data=data)
    assert all(torch.isfinite(w).all() for w in weights(result.model))
    assert any("input tokens left out: NaN or infinity" in note for note in result.report.warnings)


def test_a_generator_is_read_once():
    expected = compress(stack(), GPTQ, data=samples()).model
    got = compress(stack(), GPTQ, data=(sample for sample in samples())).model
    assert all(torch.equal(a, b) for a, b in zip(weights(expected), weights(got), strict=True))


def test_no_blocks():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)).eval()
    with pytest.warns(CompressionWarning, match="no sequence of blocks to go through: all layers were solved on the"):
        result = tcompress.compress(model, {"steps": [GPTQ]}, data=samples())
    x = torch.cat(samples())
    expected = gptq(model[0].weight, statistics_of(x.flatten(0, 1)), SCHEMES["W4A16-g32"].weights)
    assert float((result.model[0].weight_packed == expected.qdata).float().mean()) > 0.97


def test_a_layer_that_is_never_called():
    model = stack()
    model.spare = nn.Linear(32, 32)
    result = compress(model, SPARSEGPT, GPTQ, data=samples())
    note = "spare has no calibration inputs: by magnitude and rounding to nearest instead"
    assert note in result.report.warnings
    assert float((result.model.spare.packed.dequantize() == 0).float().mean()) >= 0.5


class Shares(nn.Module):
    """A block whose second layer is every block's."""

    def __init__(self, shared):
        super().__init__()
        self.own, self.shared = nn.Linear(32, 32), shared

    def forward(self, x):
        return x + self.shared(F.relu(self.own(x)))


def of_shared_layers():
    model = stack()
    shared = nn.Linear(32, 32)
    model.layers = nn.ModuleList(Shares(shared) for _ in range(3))
    return model, ("layers.0.shared",), "blocks share weights"


def of_one_block():
    model = stack()
    model.layers = nn.ModuleList(3 * [model.layers[0]])
    return model, ("layers.0.up", "layers.0.down"), "no sequence of blocks to go through"


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("make", [of_shared_layers, of_one_block])
def test_a_layer_of_several_blocks_is_solved_on_all_its_inputs(make, inplace, monkeypatch):
    (model, names, why), counts = make(), {}
    solve_layer = solve.solve_layer

    def watched(job, found):
        counts[job.name] = found.count
        return solve_layer(job, found)

    monkeypatch.setattr(solve, "solve_layer", watched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        result = tcompress.compress(model, {"steps": [GPTQ]}, data=samples(), inplace=inplace)
    tokens = sum(x[..., 0].numel() for x in samples())
    assert counts["head"] == tokens
    assert [counts[name] for name in names] == [3 * tokens] * len(names)
    assert f"{why}: all layers were solved on the original model's inputs" in result.report.warnings


def test_tied_layers():
    model = stack()
    model.layers[2].up.weight = model.layers[0].up.weight
    result = compress(model, GPTQ, data=samples())
    assert any("blocks share weights" in note for note in result.report.warnings)
    assert torch.equal(result.model.layers[0].up.weight_packed, result.model.layers[2].up.weight_packed)


def test_an_embedding_is_not_for_gptq():
    model = nn.Sequential(nn.Embedding(9, 32), nn.Linear(32, 16)).eval()
    result = compress(model, {**GPTQ, "targets": ["Embedding", "Linear"]}, data=torch.arange(9)[None])
    assert result.report.skipped[0].reason == "gptq decides by a layer's inputs, and an embedding is looked up; use rtn"


def test_attention_of_torch():
    """Its projections become layers, and are solved by what the layers that take its place are given."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    result = compress(model, GPTQ, {"step": "quantize", "attention": "int8"}, data=samples())
    actions = {r.name: r.action for r in result.report.compressed}
    assert actions["layers.1.self_attn.q_proj"] == "W4A16-g32 gptq"
    assert not [note for note in result.report.warnings if "calibration" in note]
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention


@pytest.mark.parametrize("steps", [[GPTQ], [SPARSEGPT], [SPARSEGPT, GPTQ]])
def test_a_decoder_loses_less(steps):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=96, pad_token_id=0, **sizes)).eval()
    for parameter in model.parameters():
        parameter.data *= 4 if parameter.dim() > 1 else 1
    data = [{"input_ids": torch.randint(3, 90, (4, 32))} for _ in range(4)]
    rtn = {"step": "quantize", "scheme": "W4A16-g32"}
    plain = [rtn if step["step"] == "quantize" else {**step, "algorithm": "magnitude"} for step in steps]
    errors = []
    with torch.no_grad():
        for recipe in (plain, steps):
            got = compress(model, *recipe, data=data).model
            errors.append(float(sum((got(**b).logits - model(**b).logits).norm() for b in data)))
    assert errors[1] < 0.9 * errors[0]


def test_saved_and_loaded(tmp_path):
    result = compress(stack(), SPARSEGPT, GPTQ, data=samples())
    tcompress.save(result.model, tmp_path / "saved")
    same = tcompress.load(tmp_path / "saved", model=stack())
    x = samples()[0]
    with torch.inference_mode():
        assert torch.equal(same(x), result.model(x))


@pytest.mark.parametrize("step", [SPARSEGPT, WANDA, {**SPARSEGPT, "pattern": "2:4", "sparsity": None}])
def test_pruning_in_place_is_the_same_without_a_second_copy(step):
    expected = compress(stack(), step, data=samples())
    model = stack()
    weights = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        result = tcompress.compress(model, {"steps": [step]}, samples(), inplace=True)
    assert result.model is model
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == weights
    for (name, got), (_, wanted) in zip(model.named_parameters(), expected.model.named_parameters(), strict=True):
        assert torch.equal(got, wanted), name
    assert result.report.output_cosine == pytest.approx(expected.report.output_cosine, abs=1e-6)
    for got, wanted in zip(result.report.layers, expected.report.layers, strict=True):
        assert (got.name, got.action, got.sparsity) == (wanted.name, wanted.action, wanted.sparsity)
        assert got.weight_sqnr_db == pytest.approx(wanted.weight_sqnr_db)


def test_a_written_layers_output_error_is_that_of_its_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    before, x = model[0].weight.detach().clone(), torch.randn(40, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        result = tcompress.compress(model, {"steps": [SPARSEGPT]}, x, inplace=True)
    error = (x @ (model[0].weight - before).T).square().sum() / (x @ before.T).square().sum()
    (layer,) = result.report.layers
    assert layer.output_sqnr_db == pytest.approx(-10 * float(error.detach().log10()), rel=1e-4)


@pytest.mark.parametrize("step", [WANDA, SPARSEGPT, GPTQ])
def test_layers_that_torch_masks_have_statistics_too(step):
    """Their weight is another tensor after each call."""
    masked, plain = stack(), stack()
    for model in (masked, plain):
        for block in model.layers:
            nn.utils.prune.l1_unstructured(block.up, "weight", amount=0.2)
    for block in plain.layers:
        nn.utils.prune.remove(block.up, "weight")
    got, expected = (compress(model, step, data=samples()) for model in (masked, plain))
    for x in samples(2, seed=5):
        assert torch.equal(got.model(x), expected.model(x))


class Experts(nn.Module):
    """One of three, by the sample."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)) for _ in range(3))

    def forward(self, x):
        return self.experts[int(x[0, 0, 0] > 0)](x)


def test_an_expert_that_is_not_called_borrows_no_statistics():
    torch.manual_seed(0)
    model = Experts().eval()
    data = samples()
    for i, x in enumerate(data):
        x[0, 0, 0] = 1.0 if i % 2 else -1.0
    result = compress(model, GPTQ, data=data)
    idle = [note for note in result.report.warnings if "has no calibration inputs" in note]
    assert [note.split()[0] for note in idle] == ["experts.2.0", "experts.2.2"]
    for expert, chosen in ((0, data[::2]), (1, data[1::2])):
        layer = copy.deepcopy(model.experts[expert][0])
        expected = gptq(
            layer.weight, statistics_of(torch.cat([x.flatten(0, -2) for x in chosen])), SCHEMES["W4A16-g32"].weights
        )
        assert torch.equal(result.model.experts[expert][0].packed.qdata, expected.qdata)


def test_propagation_keeps_zeros():
    model = compress(stack(), {**SPARSEGPT, "pattern": "8x4"}, data=samples()).model
    zeros = [float((p == 0).float().mean()) for p in model.parameters() if p.dim() == 2]
    result = compress(
        model, {"step": "quantize", "scheme": "W8A8", "algorithm": "gptq", "propagation": 0.5}, data=samples()
    )
    layers = [m for m in result.model.modules() if isinstance(m, QuantizedLinear)]
    got = [float((m.packed.dequantize() == 0).float().mean()) for m in layers]
    assert all(after >= before for before, after in zip(zeros, got, strict=True))
