"""Scaled dot-product attention as a module: quantized, or in floating point where accuracy demands it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from tcompress.errors import message
from tcompress.ops.attention_numbers import BITS
from tcompress.ops.attention_options import Bits, Causal, Window
from tcompress.ops.float_attention import float_attention
from tcompress.ops.quantized_attention import quantized_attention

Precision = Literal["int8", "float"]
PRECISIONS: tuple[Precision, ...] = ("int8", "float")


class Int8Attention(nn.Module):
    """`softmax(scale · q kᵀ + mask) v` by `ops.quantized_attention`, or by torch in floating point.

    It stands between the projections of an attention layer. It has no parameters and no buffers, so it leaves a state
    dict as it is. `bits` and `precision` are plain attributes and may be set at any time. Its result is a function of
    its arguments alone, so a forward hook (with_kwargs=True) may compare the two precisions on what a model really
    computes.

    Args:
        bits: 8 or 12, of q, k and v; "auto" is what the processor runs fastest.
        precision: "int8" quantizes, inference only: backward raises. "float" computes in floating point,
            differentiably, with the same conventions (`nn.float_attention`).

    Raises:
        ValueError: other values.
    """

    def __init__(self, bits: Bits = "auto", precision: Precision = "int8") -> None:
        super().__init__()
        if bits != "auto" and bits not in BITS:
            raise ValueError(message("Int8Attention", "bits", repr(bits), f"'auto' or one of {BITS}"))
        if precision not in PRECISIONS:
            raise ValueError(message("Int8Attention", "precision", repr(precision), f"one of {PRECISIONS}"))
        self.bits: Bits = bits
        self.precision: Precision = precision

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        is_causal: Causal = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        window: Window = None,
        softcap: float | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Attention over all heads; for the options see `ops.quantized_attention`.

        Args:
            q: [B, H, Sq, D]. k: [B, Hkv, Skv, D]. v: [B, Hkv, Skv, Dv].
            mask: broadcastable to [B, H, Sq, Skv]; bool, True lets a query see a key, or float, added to the scores.
            dropout: of the weights, in training mode; in evaluation mode there is none, as in `nn.Dropout`.

        Returns:
            [B, H, Sq, Dv] in the type of q; a query that sees no key gives zeros.

        Raises:
            TypeError, ValueError: as the op. ValueError: dropout in training mode where `precision` is "int8".
        """
        dropout = dropout if self.training else 0.0
        if self.precision == "float":
            return float_attention(
                q,
                k,
                v,
                mask=mask,
                is_causal=is_causal,
                scale=scale,
                enable_gqa=enable_gqa,
                window=window,
                softcap=softcap,
                dropout=dropout,
            )
        if dropout > 0:
            hint = "quantized attention is for inference: call .eval(), or set precision to 'float'"
            raise ValueError(message("Int8Attention", "dropout", dropout, "0 in training mode", hint))
        out = quantized_attention(
            q,
            k,
            v,
            bits=self.bits,
            mask=mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
        )
        assert isinstance(out, torch.Tensor)
        return out

    def extra_repr(self) -> str:
        return f"bits={self.bits}, precision={self.precision}" if self.precision == "int8" else "precision=float"
