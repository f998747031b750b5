"""Seven architectures of transformers, tiny and untrained: they compress, attention included, stay close, and come back
from disk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import tcompress
from tcompress.calibrate import first_tensor
from tcompress.nn import Int8Attention, QuantizedLinear
from tcompress.recipe import Recipe

Made = tuple[nn.Module, dict[str, torch.Tensor]]


def _ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length))


def bert() -> Made:
    config = hf.BertConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    return hf.BertModel(config), {"input_ids": _ids(), "attention_mask": torch.tensor([[1] * 12, [1] * 7 + [0] * 5])}


def distilbert() -> Made:
    return hf.DistilBertModel(hf.DistilBertConfig(vocab_size=96, dim=64, n_layers=2, n_heads=4, hidden_dim=128)), {
        "input_ids": _ids()
    }


def gpt2() -> Made:
    config = hf.GPT2Config(
        vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    )
    return hf.GPT2LMHeadModel(config), {"input_ids": _ids()}


def llama() -> Made:
    config = hf.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
    )
    return hf.LlamaForCausalLM(config), {"input_ids": _ids()}


def t5() -> Made:
    config = hf.T5Config(
        vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return hf.T5ForConditionalGeneration(config), {"input_ids": _ids(), "decoder_input_ids": _ids(2, 5)}


def vit() -> Made:
    config = hf.ViTConfig(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=32,
        patch_size=8,
    )
    return hf.ViTModel(config), {"pixel_values": torch.randn(2, 3, 32, 32)}


def whisper() -> Made:
    config = hf.WhisperConfig(
        vocab_size=96,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return hf.WhisperForConditionalGeneration(config), {
        "input_features": torch.randn(2, 8, 32),
        "decoder_input_ids": _ids(2, 5),
    }


ARCHITECTURES: list[Callable[[], Made]] = [bert, distilbert, gpt2, llama, t5, vit, whisper]
#: What the preset replaces: attention, and linear layers (or Conv1D); heads over the vocabulary stay.
ATTENTIONS = {"bert": 2, "distilbert": 2, "gpt2": 2, "llama": 2, "t5": 6, "vit": 2, "whisper": 6}
LINEAR_LAYERS = {"bert": 13, "distilbert": 12, "gpt2": 8, "llama": 14, "t5": 32, "vit": 13, "whisper": 32}


def _run(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.inference_mode():
        output = first_tensor(model(**inputs))
    assert output is not None
    return output


def _cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def _quantized_attentions(model: nn.Module) -> int:
    return sum(isinstance(m, Int8Attention) and m.precision == "int8" for m in model.modules())


def _make(factory: Callable[[], Made]) -> Made:
    torch.manual_seed(0)
    model, inputs = factory()
    return model.eval(), inputs


@pytest.mark.parametrize("factory", ARCHITECTURES, ids=lambda f: f.__name__)
def test_preset_int8(factory, tmp_path):
    model, inputs = _make(factory)
    expected = _run(model, inputs)
    result = tcompress.compress(model, "int8", data=inputs)
    assert sum(isinstance(m, QuantizedLinear) for m in result.model.modules()) == LINEAR_LAYERS[factory.__name__]
    got = _run(result.model, inputs)
    assert _cosine(got, expected) >= 0.999
    assert result.report.output_cosine == pytest.approx(_cosine(got, expected), abs=1e-6)
    assert torch.equal(_run(model, inputs), expected), "the original changed"
    for layer in result.report.skipped:
        assert layer.reason
    assert len(result.report.attention) == ATTENTIONS[factory.__name__]
    assert all(a.quantized and a.total.cosine > 0.999 for a in result.report.attention)
    assert _quantized_attentions(result.model) == ATTENTIONS[factory.__name__]

    tcompress.save(result.model, tmp_path)
    loaded = tcompress.load(tmp_path)
    assert type(loaded) is type(model)
    assert _quantized_attentions(loaded) == ATTENTIONS[factory.__name__]
    assert torch.equal(_run(loaded, inputs), got)


@pytest.mark.parametrize("bits", [8, 12])
@pytest.mark.parametrize("factory", ARCHITECTURES, ids=lambda f: f.__name__)
def test_attention_alone(factory, bits):
    """Linear layers as they are, so that nothing else can differ; and it does differ."""
    model, inputs = _make(factory)
    result = tcompress.compress(model, {"steps": [{"attention": f"int{bits}"}]})
    assert _quantized_attentions(result.model) == ATTENTIONS[factory.__name__]
    got, expected = _run(result.model, inputs), _run(model, inputs)
    assert 0 < (got - expected).norm() < {8: 0.02, 12: 0.002}[bits] * expected.norm()


@pytest.mark.parametrize("scheme", ["W8A8", "W7A7"])
@pytest.mark.parametrize("factory", [bert, gpt2, whisper], ids=lambda f: f.__name__)
def test_other_schemes(factory, scheme):
    model, inputs = _make(factory)
    recipe = Recipe.load({"steps": [{"step": "quantize", "scheme": scheme}]})
    result = tcompress.compress(model, recipe)
    assert {layer.action for layer in result.report.compressed} == {scheme}
    assert _cosine(_run(result.model, inputs), _run(model, inputs)) >= 0.999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(dtype):
    model, inputs = _make(llama)
    model = model.to(dtype)
    expected = _run(model, inputs)
    got = _run(tcompress.compress(model).model, inputs)
    assert got.dtype == dtype
    assert _cosine(got, expected) >= 0.999


def test_converting_a_compressed_model():
    model, inputs = _make(bert)
    compressed = tcompress.compress(model).model
    got = _run(copy.deepcopy(compressed).bfloat16(), inputs)
    assert got.dtype == torch.bfloat16
    assert _cosine(got, _run(model, inputs)) >= 0.999


@pytest.mark.parametrize("factory", [gpt2, llama], ids=lambda f: f.__name__)
def test_generate(factory):
    model, inputs = _make(factory)
    compressed: Any = tcompress.compress(model).model
    prompt = inputs["input_ids"][:1]
    arguments: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tokens = compressed.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments)
    assert tokens.shape == (1, prompt.shape[1] + 4)
    assert torch.equal(tokens[:, : prompt.shape[1]], prompt)


def test_tied_head_stays_tied():
    model, _ = _make(gpt2)
    result = tcompress.compress(model)
    assert result.model.lm_head.weight is result.model.transformer.wte.weight
    reasons = {layer.name: layer.reason for layer in result.report.skipped}
    assert reasons["lm_head"] == "ignored by 'lm_head'"
    assert "lm_head.weight" in reasons["transformer.wte"]


def test_head_under_another_name_is_left_alone():
    model, _ = _make(whisper)
    reasons = {layer.name: layer.reason for layer in tcompress.compress(model).report.skipped}
    assert "output embeddings" in reasons["proj_out"]
