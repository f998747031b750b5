"""Fused attention of new queries over an int8 key-value cache."""

from __future__ import annotations

from typing import Any

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.attention_options import MAX_HEAD_DIM, Causal, Window, check_groups, checked_options, expanded_mask
from tcompress.ops.attention_reference import KeysAndValues, Visible, attend
from tcompress.ops.kv_cache_append import BITS, check_cache
from tcompress.ops.quantize_per_token import check_float
from tcompress.ops.quantized_attention import heads_last
from tcompress.packing import kv_cache as layout


def kv_cache_attention(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    length: int,
    head_dim_v: int,
    *,
    mask: torch.Tensor | None = None,
    is_causal: Causal = False,
    scale: float | None = None,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`quantized_attention(q, k, v, bits=8, enable_gqa=True, …)` where k and v lie quantized in a cache.

    The numbers are those of `quantized_attention`, but for the mean that was taken from k (`kv_cache_append`). With one
    to a few queries the kernel reads each byte of the cache once for all query heads that share a head of k and v, and
    splits the tokens over the threads where there are few heads.

    Args:
        q: [B, H, Sq, D], float32, bfloat16 or float16; H a multiple of Hkv.
        k_data, k_scale, v_data, v_scale, k_mean: the cache, see `kv_cache_append`.
        length: Skv, the tokens in the cache.
        head_dim_v: Dv.
        mask, is_causal, scale, window, softcap, return_lse: as in `quantized_attention`, where "bottom_right" is what
            the last queries of a sequence want.

    Returns:
        [B, H, Sq, Dv] in the type of q; with return_lse also [B, H, Sq] float32.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, or an unknown option.
    """
    op = "kv_cache_attention"
    check_float(q, op, "q")
    if q.dim() != 4 or q.shape[0] != k_data.shape[0]:
        raise ValueError(message(op, "q", list(q.shape), f"[{k_data.shape[0]}, H, Sq, D]"))
    if max(q.shape[3], head_dim_v) > MAX_HEAD_DIM:
        raise ValueError(message(op, "q, head_dim_v", f"{q.shape[3]}, {head_dim_v}", f"at most {MAX_HEAD_DIM}"))
    check_cache(op, k_data, k_scale, v_data, v_scale, k_mean, q.shape[3], head_dim_v)
    check_groups(op, q.shape[1], k_data.shape[1], True)
    if not 0 <= length <= k_data.shape[2] * layout.BLOCK:
        raise ValueError(message(op, "length", length, f"0 to {k_data.shape[2] * layout.BLOCK}, the room of the cache"))
    expanded = expanded_mask(op, mask, (*q.shape[:3], length))
    _, *options = checked_options(op, 8, is_causal, window, softcap, scale, q.shape[3])
    cache = (k_data, k_scale, v_data, v_scale, k_mean)
    out, lse = backend.call(op, q, *cache, expanded, length, head_dim_v, *options, return_lse)
    return (out, lse) if return_lse else out


def reference(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    head_dim_v: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    k = layout.unpack_keys(k_data, length, q.shape[3])
    v = layout.unpack_values(v_data, length, head_dim_v)
    scales = (t.flatten(2)[..., :length] for t in (k_scale, v_scale))
    k_steps, v_steps = scales
    kv = KeysAndValues(k.float(), k_steps, v.float(), v_steps, k_mean)
    out, lse = attend(q, kv, BITS, mask, Visible(bottom_right, left, right), scale, softcap)
    return heads_last(out.to(q.dtype)), lse if return_lse else lse.new_empty(0)


def fake(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    head_dim_v: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, sq, _ = q.shape
    lse = q.new_empty((b, h, sq) if return_lse else (0,), dtype=torch.float32)
    return q.new_empty((b, sq, h, head_dim_v)).transpose(1, 2), lse


def flops(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    head_dim_v: int,
    *args: object,
) -> int:
    b, h, sq, d = q.shape
    return 2 * b * h * sq * length * (d + head_dim_v)


def nbytes(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    head_dim_v: int,
    *args: object,
) -> int:
    b, h, sq, d = q.shape
    tokens = b * k_data.shape[1] * length
    return tokens * (d + head_dim_v + 8) + b * h * sq * (d + head_dim_v) * q.element_size()


define(
    Op(
        name="kv_cache_attention",
        schema=(
            "(Tensor q, Tensor k_data, Tensor k_scale, Tensor v_data, Tensor v_scale, Tensor k_mean, Tensor? mask,"
            " int length, int head_dim_v, bool bottom_right, int left, int right, float softcap, float scale,"
            " bool return_lse) -> (Tensor, Tensor)"
        ),
        reference=reference,
        fake=fake,
        # Sums in another order where the tokens are split over threads; else bit for bit.
        tolerance=4.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("kv_cache_attention", "cpu", unsupported=cpu_unsupported)
