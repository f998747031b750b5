"""Whisper's weights from a CTranslate2 file, as `transformers.WhisperForConditionalGeneration`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from quality.ctranslate2_file import read_variables

END, START, NO_TIMESTAMPS = 50256, 50257, 50362


def load_model(file: Path) -> Any:
    """Whisper tiny.en, or another English Whisper with heads of 64, in float32."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    variables = read_variables(file)
    vocabulary, width = variables["decoder/embeddings/weight"].shape
    layers = sum(n.startswith("encoder/layer_") and n.endswith("ffn/linear_0/weight") for n in variables)
    config = WhisperConfig(
        vocab_size=vocabulary,
        d_model=width,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=width // 64,
        decoder_attention_heads=width // 64,
        encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
        decoder_start_token_id=START,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    model = WhisperForConditionalGeneration(config)
    model.load_state_dict(_state(variables, layers))
    return model.eval()


def _state(variables: dict[str, torch.Tensor], layers: int) -> dict[str, torch.Tensor]:
    embeddings = variables["decoder/embeddings/weight"]
    state = {"model.decoder.embed_tokens.weight": embeddings, "proj_out.weight": embeddings}
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            state[f"model.encoder.{conv}.{part}"] = variables[f"encoder/{conv}/{part}"]
    for side in ("encoder", "decoder"):
        state[f"model.{side}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
        state |= _renamed(variables, f"{side}/layer_norm", f"model.{side}.layer_norm", _NORM)
        for i in range(layers):
            old, new = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            state |= _renamed(variables, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm", _NORM)
            state |= _renamed(variables, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm", _NORM)
            state |= _renamed(variables, f"{old}/ffn/linear_0", f"{new}.fc1", _LINEAR)
            state |= _renamed(variables, f"{old}/ffn/linear_1", f"{new}.fc2", _LINEAR)
            state |= _renamed(variables, f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj", _LINEAR)
            state |= _split(variables, f"{old}/self_attention/linear_0", f"{new}.self_attn", "qkv")
            if side == "decoder":
                cross = f"{new}.encoder_attn"
                state |= _renamed(variables, f"{old}/attention/layer_norm", f"{cross}_layer_norm", _NORM)
                state |= _split(variables, f"{old}/attention/linear_0", cross, "q")
                state |= _split(variables, f"{old}/attention/linear_1", cross, "kv")
                state |= _renamed(variables, f"{old}/attention/linear_2", f"{cross}.out_proj", _LINEAR)
    return state


_NORM = {"gamma": "weight", "beta": "bias"}
_LINEAR = {"weight": "weight", "bias": "bias"}


def _renamed(variables: dict[str, torch.Tensor], old: str, new: str, parts: dict[str, str]) -> dict[str, torch.Tensor]:
    return {f"{new}.{b}": variables[f"{old}/{a}"] for a, b in parts.items()}


def _split(variables: dict[str, torch.Tensor], old: str, new: str, projections: str) -> dict[str, torch.Tensor]:
    """One fused projection to several; those to keys have no bias."""
    found = {}
    for part in ("weight", "bias"):
        pieces = variables[f"{old}/{part}"].chunk(len(projections))
        for letter, piece in zip(projections, pieces, strict=True):
            if (letter, part) != ("k", "bias"):
                found[f"{new}.{letter}_proj.{part}"] = piece.clone()
    return found
