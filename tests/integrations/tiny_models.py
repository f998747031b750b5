"""Models of transformers, tiny and untrained, but with weights large enough that attention decides what comes out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import transformers as hf

#: Where weights have this spread, scores differ by several units: dropping a mask is then plain to see.
SPREAD = 0.2
_DECODER: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "initializer_range": SPREAD,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_ENCODER: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "initializer_range": SPREAD,
}


def llama(**changes: Any) -> Any:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_DECODER | changes))


def qwen2(**changes: Any) -> Any:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_DECODER | changes))


def mistral(**changes: Any) -> Any:
    return hf.MistralForCausalLM(hf.MistralConfig(**_DECODER | {"sliding_window": 5} | changes))


def gemma2(**changes: Any) -> Any:
    """Softcap, and one layer with a window, one without."""
    own = {"sliding_window": 5, "attn_logit_softcapping": 3.0, "head_dim": 16, "query_pre_attn_scalar": 16}
    return hf.Gemma2ForCausalLM(hf.Gemma2Config(**_DECODER | own | changes))


def gpt_oss(**changes: Any) -> Any:
    """Attention sinks. All experts are taken: a choice between them could turn on a rounding."""
    own = {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 5}
    return hf.GptOssForCausalLM(hf.GptOssConfig(**_DECODER | own | changes))


def gpt2(**changes: Any) -> Any:
    names = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": SPREAD}
    tokens = {name: _DECODER[name] for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**names | tokens | changes))


def bert(**changes: Any) -> Any:
    return hf.BertModel(hf.BertConfig(vocab_size=96, **_ENCODER | changes))


def modernbert(**changes: Any) -> Any:
    """A window to both sides."""
    own = {"vocab_size": 96, "local_attention": 8, "global_attn_every_n_layers": 2, "initializer_cutoff_factor": 2.0}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    return hf.ModernBertModel(hf.ModernBertConfig(**_ENCODER | own | tokens | changes))


def vit(**changes: Any) -> Any:
    return hf.ViTModel(hf.ViTConfig(image_size=32, patch_size=8, **_ENCODER | changes))


def t5(**changes: Any) -> Any:
    """A position bias."""
    sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    return hf.T5ForConditionalGeneration(hf.T5Config(**sizes | tokens | changes))


def whisper(**changes: Any) -> Any:
    sizes = {"d_model": 64, "num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64}
    both: dict[str, Any] = {}
    for part in ("encoder", "decoder"):
        both |= {f"{part}_layers": 2, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 96}
    tokens = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = hf.WhisperConfig(**sizes | both | tokens | {"init_std": SPREAD} | changes)
    return hf.WhisperForConditionalGeneration(config)


DECODERS = [llama, qwen2, mistral, gemma2, gpt_oss, gpt2]


def made(factory: Any, **changes: Any) -> Any:
    torch.manual_seed(0)
    model = factory(**changes).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.normal_()
    return model


def ids(batch: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(seed))


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
