"""Attention over few keys in float32: what `bits="auto"` means where integers bring no speed."""

from __future__ import annotations

import math
from typing import Literal

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.attention_options import MAX_SHORT_KEYS, check_heads, checked_options, keys_of_first
from tcompress.ops.quantized_attention import heads_last


def short_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    is_causal: bool | Literal["top_left", "bottom_right"] = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """`softmax(scale · q kᵀ) v` in float32 arithmetic, for at most 64 keys.

    Its rounding differs from path to path, as float32 sums do; the error is that of torch's float32 attention.

    Args:
        q: [B, H, Sq, D], float32, bfloat16 or float16; any strides. D is at most 256.
        k: [B, Hkv, Skv, D], like q; Skv is at most 64.
        v: [B, Hkv, Skv, Dv], like q; Dv is at most 256.
        is_causal, scale, enable_gqa: as in `quantized_attention`.

    Returns:
        [B, H, Sq, Dv] in the type of q, in memory [B, Sq, H, Dv]. A query that sees no key gives zeros. One that holds
        NaN or infinity, or sees a key or value token that does, gives NaN; so does one whose score overflows.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown option, more than 64 keys, D above 256.
    """
    op = "short_attention"
    _, _, sq, skv, d = check_heads(op, q, k, v, enable_gqa)
    if skv > MAX_SHORT_KEYS:
        hint = "quantized_attention takes any number"
        raise ValueError(message(op, "k", list(k.shape), f"at most {MAX_SHORT_KEYS} keys", hint))
    _, bottom_right, _, right, _, scale = checked_options(op, "auto", is_causal, None, None, scale, d)
    out: torch.Tensor = backend.call(op, q, k, v, keys_of_first(bottom_right, right, sq, skv), scale)
    return out


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, scale: float) -> torch.Tensor:
    """first: how many keys query 0 sees; query i sees i more, from key 0 on, as far as there are any."""
    (_, h, sq, _), (_, hkv, skv, _) = q.shape, k.shape
    k, v = (x.float().repeat_interleave(h // max(hkv, 1), 1) for x in (k, v))
    scores = (q.float() @ k.mT) * scale
    seen = torch.arange(skv, device=q.device) < first + torch.arange(sq, device=q.device)[:, None]
    odd = ~(scores.isfinite() & v.isfinite().all(-1)[:, :, None])
    weights = torch.softmax(torch.where(seen & ~odd, scores, -math.inf), -1).nan_to_num(0.0)  # NaN: no key is seen
    out = weights @ torch.where(v.isfinite(), v, 0.0)
    out = torch.where((seen & odd).any(-1, keepdim=True), math.nan, out)
    return heads_last(out.to(q.dtype))


def fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int, scale: float) -> torch.Tensor:
    b, h, sq, _ = q.shape
    return q.new_empty((b, sq, h, v.shape[3])).transpose(1, 2)


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object) -> int:
    b, h, sq, d = q.shape
    return 2 * b * h * sq * k.shape[2] * (d + v.shape[3])


def nbytes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object) -> int:
    b, h, sq, d = q.shape
    return (b * h * sq * (d + v.shape[3]) + k.numel() + v.numel()) * q.element_size()


define(
    Op(
        name="short_attention",
        schema="(Tensor q, Tensor k, Tensor v, int first, float scale) -> Tensor",
        reference=reference,
        fake=fake,
        tolerance=4.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("short_attention", "cpu", unsupported=cpu_unsupported)
