"""The attention function "tcompress" of `transformers`' attention interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tcompress.errors import message
from tcompress.nn.int8_attention import Int8Attention

_default = Int8Attention()


def register() -> None:
    """Makes `attn_implementation="tcompress"` known to `transformers`, with the masks of "sdpa"."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("tcompress", attention_forward)
    AttentionMaskInterface.register("tcompress", sdpa_mask)


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Calls the module's `tcompress_attention`, or quantized attention if it has none.

    Raises:
        ValueError: position_bias.
    """
    if position_bias is not None:
        raise ValueError(message("tcompress", "position_bias", "a tensor", None, "use attn_implementation='sdpa'"))
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    attention = getattr(module, "tcompress_attention", _default)
    causal = is_causal and attention_mask is None and query.shape[2] > 1
    out = attention(
        query,
        key,
        value,
        mask=attention_mask,
        is_causal=causal,
        scale=scaling,
        enable_gqa=True,
        softcap=softcap,
        dropout=dropout,
    )
    return out.transpose(1, 2).contiguous(), None
