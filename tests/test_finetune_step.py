"""The step that trains what quantization found, in a recipe."""

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tcompress
from tcompress.distill import trainer
from tcompress.match_attention import holding
from tcompress.recipe import Recipe

GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq"}
FINETUNE = {"step": "finetune", "steps": 30, "lr": 4e-3, "integer_rate": 10.0}
pytest.importorskip("accelerate")


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 90, "num_hidden_layers": 2, "max_position_embeddings": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    return model


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, 90, (4, 24), generator=generator)} for _ in range(6)]


@torch.no_grad()
def divergence(model, other, data):
    ours, theirs = (torch.cat([m(**d).logits.log_softmax(-1).flatten(0, 1) for d in data]) for m in (other, model))
    return float(nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def compress(model, steps, data, **options):
    samples = options.pop("samples", None)
    return tcompress.compress(model, {"steps": steps, "samples": samples}, data=data, progress=False, **options)


def test_it_brings_the_outputs_back(llama, data):
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    found = compress(llama, [GPTQ], data)
    trained = compress(llama, [FINETUNE, GPTQ], data)  # it comes last, wherever it stands
    assert divergence(llama, trained.model, data) < 0.8 * divergence(llama, found.model, data)
    layer = trained.model.model.layers[0].mlp.down_proj
    assert isinstance(layer, tcompress.nn.QuantizedLinear)
    assert not torch.equal(layer.packed.scale, found.model.model.layers[0].mlp.down_proj.packed.scale)
    (line,) = [line for line in trained.report.layers if line.action == "finetuned"]
    assert "30 steps, loss" in line.reason
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
    assert all(parameter.requires_grad for parameter in llama.parameters())
    again = compress(llama, [GPTQ, FINETUNE], data)
    assert torch.equal(again.model(**data[0]).logits, trained.model(**data[0]).logits)


@pytest.mark.parametrize(
    "steps",
    [
        [{"step": "quantize", "scheme": "W4A8-asym"}],
        [{"step": "quantize", "scheme": "W8A8-static"}],
        [{"step": "prune", "pattern": "2:4", "algorithm": "sparsegpt"}, GPTQ],
        [{"step": "smooth"}, {"step": "quantize", "scheme": "W8A8", "outliers": 3}],
        [GPTQ, {"step": "quantize", "scheme": "W8A16", "targets": "Embedding"}],
        [{"step": "prune", "pattern": "1x4", "sparsity": 0.5}, {"step": "sparse", "targets": "*mlp*"}, GPTQ],
    ],
    ids=["activations", "static", "pruned", "outliers", "embedding", "sparse"],
)
def test_beside_other_steps(llama, data, steps):
    found = compress(llama, steps, data)
    trained = compress(llama, [*steps, FINETUNE], data)
    assert divergence(llama, trained.model, data) < divergence(llama, found.model, data)
    for (name, ours), (_, theirs) in zip(
        trained.model.named_modules(), found.model.named_modules(), strict=True
    ):  # pruned weights stay zero, and what is not trained stays what it was
        if isinstance(ours, tcompress.nn.QuantizedLinear):
            zeros = theirs.packed.dequantize() == 0
            if steps[0]["step"] == "prune":
                assert not ours.packed.dequantize()[zeros].all(), name
                assert (ours.packed.dequantize() == 0).float().mean() >= 0.5
        elif isinstance(ours, tcompress.nn.SparseLinear | tcompress.nn.QuantizedEmbedding):
            assert torch.equal(ours.packed.dequantize(), theirs.packed.dequantize()), name


def test_projections_of_torch_attention(data):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    model = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False).eval()
    samples = [torch.randn(3, 10, 32) for _ in range(3)]
    steps = [{"step": "quantize", "attention": "int8"}, {"step": "quantize", "scheme": "W4A8"}]
    losses = {"losses": ["cosine"]}
    found = compress(model, steps, samples)
    trained = compress(model, [*steps, {**FINETUNE, **losses}], samples)
    ours, theirs = (r.model.layers[0].self_attn.q_proj.packed.scale for r in (trained, found))
    assert not torch.equal(ours, theirs)


def test_what_is_held_for_a_while_goes_back():
    model, other = nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)
    first = model[0]
    with holding(model, {first: other}):
        assert model[0] is other
    assert model[0] is first


def test_samples_for_the_algorithms_and_all_for_training(llama, data, monkeypatch):
    seen = []
    solve = tcompress.swap_layers.solve

    def spied(*arguments, **keywords):
        seen.append(len(arguments[5]))
        return solve(*arguments, **keywords)

    monkeypatch.setattr("tcompress.swap_layers.solve", spied)
    few = compress(llama, [GPTQ, FINETUNE], data, samples=2)
    assert seen == [2]
    all_ = compress(llama, [GPTQ, FINETUNE], data)
    assert not torch.equal(few.model(**data[0]).logits, all_.model(**data[0]).logits)


def test_a_stopped_run_goes_on(llama, data, tmp_path):
    step = {**FINETUNE, "steps": 12, "save_every": 5}
    expected = compress(llama, [GPTQ, step], data).model(**data[0]).logits

    class Stopped(Exception):
        pass

    kept, calls = trainer._Run.step, []

    def stopping(self, step, batches):
        calls.append(step)
        if step == 8:
            raise Stopped
        return kept(self, step, batches)

    trainer._Run.step = stopping
    try:
        with pytest.raises(Stopped):
            compress(llama, [GPTQ, step], data, resume=tmp_path)
    finally:
        trainer._Run.step = kept
    assert len(list(tmp_path.glob("finetune-*"))) == 1
    assert torch.equal(compress(llama, [GPTQ, step], data, resume=tmp_path).model(**data[0]).logits, expected)


@pytest.mark.parametrize("inplace", [False, True])
def test_in_place(llama, data, inplace):
    model = copy.deepcopy(llama)
    step = {**FINETUNE, "steps": 5}
    prune = {"step": "prune", "pattern": "2:4", "algorithm": "sparsegpt", "targets": "*mlp*"}
    steps = [prune, {**GPTQ, "targets": "*attn*"}]
    result = compress(model, [*steps, step], data, inplace=inplace)
    expected = compress(llama, [*steps, step], data)
    assert (result.model is model) == inplace
    assert torch.equal(result.model(**data[0]).logits, expected.model(**data[0]).logits)


def test_errors(llama, data):
    with pytest.raises(ValueError, match="finetune without quantize"):
        Recipe.load({"steps": [FINETUNE]})
    with pytest.raises(ValueError, match="2 of finetune"):
        Recipe.load({"steps": [GPTQ, FINETUNE, FINETUNE]})
    with pytest.raises(ValueError, match="data: got none"):
        tcompress.compress(llama, {"steps": [{"scheme": "W8A8"}, FINETUNE]}, progress=False)
    with pytest.raises(ValueError, match="match no layer with integers"):
        compress(llama, [GPTQ, {**FINETUNE, "targets": "nothing"}], data)
    with pytest.raises(ValueError, match="expected each kind once"):
        Recipe.load({"steps": [GPTQ, {**FINETUNE, "losses": ["logits", "logits"]}]})
