"""Where training of integers meets the other parts: it simulates what is packed, and touches nothing else."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

import tcompress

pytest.importorskip("accelerate")
GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq"}
FINETUNE = {"step": "finetune", "steps": 3}
#: So small a rate changes nothing, so that the loss is that of what was found.
STILL = {"step": "finetune", "steps": 1, "lr": 1e-12}


def llama(tied=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=90, num_hidden_layers=2, tie_word_embeddings=tied)
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4)
    for layer in model.model.layers:  # inputs much larger than the others
        layer.input_layernorm.weight.data[3] = 60
    return model


def tokens(n=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 90, (4, 24), generator=generator)} for _ in range(n)]


def compress(model, steps, data, **options):
    samples = options.pop("samples", None)
    return tcompress.compress(model, {"steps": steps, "samples": samples}, data=data, progress=False, **options)


@torch.no_grad()
def divergence(model, other, batch):
    ours, theirs = (m(**batch).logits.log_softmax(-1).flatten(0, 1) for m in (other, model))
    return float(nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


def loss_of(result):
    (line,) = [line for line in result.report.layers if line.action == "finetuned"]
    return float(re.search(r"loss (\S+) ->", line.reason)[1])


QUANTIZED = {
    "outliers": [{"scheme": "W8A8", "algorithm": "rtn", "outliers": 20}],
    "outliers, static": [{"scheme": "W8A8-static", "algorithm": "rtn", "outliers": 20}],
    "outliers, zero points": [{"scheme": "W7A7", "algorithm": "gptq", "outliers": 20}],
    "sparse": [
        {"step": "prune", "pattern": "1x4", "sparsity": 0.5, "targets": "*mlp*"},
        {"step": "sparse", "targets": "*mlp*"},
        {"scheme": "W4A16-g32"},
    ],
    "the head's integers are its embedding's": [
        {**GPTQ, "ignore": []},
        {"scheme": "W4A16-g32", "targets": ["Embedding"], "ignore": []},
    ],
    "one weight, two activations": [
        {"scheme": "W8A7", "targets": "*layers.0*"},
        {"scheme": "W8A8"},
    ],
}


@pytest.mark.parametrize("steps", QUANTIZED.values(), ids=QUANTIZED)
def test_what_is_trained_is_what_is_packed(steps):
    model, data = llama(tied=steps[-1].get("targets") == ["Embedding"]), tokens()
    if steps[-1] == {"scheme": "W8A8"}:
        one, other = (layer.mlp.up_proj for layer in model.model.layers)
        one.weight = other.weight
    result = compress(model, [*steps, STILL], data)
    assert loss_of(result) == pytest.approx(divergence(model, result.model, data[0]), rel=0.02)
    compress(model, [*steps, FINETUNE], data)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_outliers_are_there():
    """Else the cases above would show nothing."""
    found = compress(llama(), QUANTIZED["outliers"], tokens()).model
    assert any(isinstance(m, tcompress.nn.OutlierLinear) for m in found.modules())


def test_masks_of_torch_and_a_corrected_bias():
    model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)).eval()
    data = [torch.randn(64, 32) for _ in range(2)]
    torch_prune.l1_unstructured(model[0], "weight", 0.5)
    torch_prune.l1_unstructured(model[0], "bias", 0.5)
    model(data[0])
    step = {**FINETUNE, "losses": ["cosine"]}
    result = compress(model, [{"scheme": "W4A16", "bias_correction": True}, step], data)
    zeros = model[0].weight == 0
    assert (result.model[0].packed.dequantize()[zeros] == 0).all()
    assert float((result.model(data[0]) - model(data[0])).norm() / model(data[0]).norm()) < 0.15


@pytest.mark.parametrize("first", [{"scheme": "W4A16-g32"}, GPTQ])
@pytest.mark.parametrize("where", ["resume", "checkpoint"])
def test_a_checkpoint_of_other_data_is_not_taken_up(tmp_path, first, where):
    model = llama()
    step = FINETUNE if where == "resume" else {**FINETUNE, "checkpoint": str(tmp_path)}
    options = {"resume": tmp_path} if where == "resume" else {}
    compress(model, [first, step], [*tokens(), *tokens(2, seed=1)], samples=1, **options)
    with pytest.raises(ValueError, match="of a run with other settings, expected the same; they differ in data"):
        compress(model, [first, step], [*tokens(), *tokens(2, seed=2)], samples=1, **options)


def test_two_trainings_in_one_recipe_may_differ_in_precision():
    distill = {"step": "distill", "steps": 2, "lr": 1e-5}
    steps = [distill, GPTQ, {**FINETUNE, "mixed_precision": "bf16"}]
    result = compress(llama(), steps, tokens(2))
    assert [line.action for line in result.report.layers if line.action in ("distilled", "finetuned")] == [
        "distilled",
        "finetuned",
    ]


def test_the_users_own_accelerator_stays():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    before = dict(AcceleratorState._shared_state)
    AcceleratorState._shared_state.clear()
    try:
        own = Accelerator(cpu=True, mixed_precision="bf16")
        compress(llama(), [GPTQ, FINETUNE], tokens(2))
        assert own.state.mixed_precision == "bf16"
        assert Accelerator(cpu=True).mixed_precision == "bf16"
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("steps", [[GPTQ, FINETUNE], [{"step": "distill", "steps": 2, "lr": 1e-5}, {"scheme": "W8A8"}]])
def test_the_callers_mode_does_not_matter(mode, steps):
    model, data = llama(), tokens(2)
    expected = compress(model, steps, data).model(**data[0]).logits
    with mode():
        result = compress(model, steps, data)
    assert torch.equal(result.model(**data[0]).logits, expected)


@pytest.mark.parametrize("step", [FINETUNE, {"step": "distill", "steps": 2, "lr": 1e-5}])
def test_labels_of_an_encoder_decoder(step):
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(
        T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=50, decoder_start_token_id=0)
    ).eval()
    ids = torch.randint(1, 50, (2, 8))
    data = [{"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.randint(1, 50, (2, 5))}]
    steps = [step, {"scheme": "W4A16"}]
    result = compress(model, steps, data)
    logits = result.model(**data[0]).logits
    assert logits.shape == (2, 5, 50)
    if step is FINETUNE:
        still = compress(model, [{**STILL}, {"scheme": "W4A16"}], data)
        ours, theirs = (m(**data[0]).logits.log_softmax(-1).flatten(0, 1) for m in (still.model, model))
        true = nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean")
        assert loss_of(still) == pytest.approx(float(true), rel=0.02)


def test_padding_of_a_tuple_counts_nowhere():
    model, (batch,) = llama(), tokens()
    mask = torch.ones_like(batch["input_ids"])
    mask[:, 12:] = 0
    pair = next(iter(TensorDataset(batch["input_ids"][None], mask[None])))
    named = compress(model, [{"scheme": "W4A16"}, STILL], [{**batch, "attention_mask": mask}])
    placed = compress(model, [{"scheme": "W4A16"}, STILL], [tuple(pair)])
    everything = compress(model, [{"scheme": "W4A16"}, STILL], [batch])
    assert loss_of(placed) == loss_of(named) != loss_of(everything)


@pytest.mark.parametrize("case", ["accelerate", "targets", "compressed"])
def test_what_cannot_be_trained_is_said_before_layers_are_solved(monkeypatch, case):
    model, steps, error = llama(), [GPTQ, FINETUNE], ValueError
    if case == "accelerate":
        monkeypatch.setitem(sys.modules, "accelerate", None)
        error, text = ImportError, r"finetune: accelerate: got .*, expected it; pip install tcompress\[train\]"
    elif case == "targets":
        steps, text = [GPTQ, {**FINETUNE, "targets": "mpl"}], "match no layer with integers"
    else:
        model = compress(model, [{"scheme": "W8A8", "targets": "*layers.0*"}], None).model
        text = "finetune: model: got 7 compressed layers"
    monkeypatch.setattr("tcompress.swap_layers.solve", None)
    with pytest.raises(error, match=text):
        compress(model, steps, tokens())
