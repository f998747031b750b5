"""Fused attention on integers: softmax(Q Kᵀ) V with Q, K and V quantized on the way in."""

from __future__ import annotations

import math
from typing import Any

import torch

from tcompress import backend
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.attention_options import (
    Bits,
    Causal,
    Window,
    check_heads,
    checked_options,
    expanded_mask,
    is_short,
    keys_of_first,
)
from tcompress.ops.attention_reference import KeysAndValues, Visible, attend
from tcompress.ops.float_attention import float_attention

#: Why `bits="auto"` is no kernel of ours on a GPU. docs/design/010.
FLOAT_ON_CUDA = (
    "bits='auto' on a GPU: on an H100, cuDNN's float16 and bfloat16 kernels took less time than the Triton kernel at "
    "every size measured; bits=8 runs the Triton kernel, faster than FlashAttention-2 from 4096 tokens on; other GPUs "
    "are not measured"
)


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    bits: Bits = "auto",
    mask: torch.Tensor | None = None,
    is_causal: Causal = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> Any:
    """`softmax(scale · q kᵀ + mask) v`, as `torch.nn.functional.scaled_dot_product_attention`, in integers.

    ::

        k'       = k - mean over tokens(k)        leaves the softmax as it is; one channel's bias costs no bits
        Q, K, V  = integers of `bits` bits, one scale a token and head
        S        = Q Kᵀ                           exact, in int32
        s        = S · scales                     in ticks, 2^-11 of an exponent of 2
        P        = 2^(s - max s)                  per block of 64 keys, integers of 13 bits, in 16-bit arithmetic
        O        = Σ over blocks, rescaled to the common maximum, of (P · scales of V) V      P V exact, in int32

    The result of 8 or 12 bits is the same on every path of the CPU, bit for bit. Relative error against float64 on
    normal inputs: about 0.001 with 12 bits, 0.011 with 8. The Triton kernel has Q and K in these integers too, with a
    scale for each block of keys, and P and V in 16-bit floats: not the same bits, and the same error or less. 12 bits
    take four products of bytes for Q Kᵀ there, more work than one of 16-bit floats.

    Papers: the blockwise softmax, Milakov & Gimelshein, arXiv 1805.02867, section 3, and Dao et al., arXiv 2205.14135,
    section 3.1; smoothing of K, Zhang et al. (SageAttention), arXiv 2410.02367, section 4.2.

    Args:
        q: [B, H, Sq, D], float32, bfloat16 or float16; any strides. D is at most 256.
        k: [B, Hkv, Skv, D], like q.
        v: [B, Hkv, Skv, Dv], like q; Dv is at most 256.
        bits: 8 or 12, of q, k and v. "auto" takes what this processor runs fastest: 8 where it has a dot product of
            bytes (AVX-512 VNNI, AMX), else 12, which there cost no more; and float32 instead of integers where these
            bring no speed: for at most 64 keys and 2304 pairs of a query with a key (48 × 48) for each head of k,
            without mask, left limit of a window, softcap or return_lse. Its error is then that of `short_attention`,
            below that of 12 bits, and its last places may differ from path to path. On a GPU "auto" is torch's own
            attention in the type of q, which has been faster where we measured, or 8 bits with return_lse.
        mask: broadcastable to [B, H, Sq, Skv]. bool: True lets a query see a key. float: added to the scores; -inf
            hides the key.
        is_causal: True or "top_left": query i sees the keys 0 … i, torch's convention. "bottom_right": it sees the keys
            0 … i + Skv - Sq, so that the last query sees all, as a chunk of queries after a cache wants.
        scale: of the scores; 1/√D by default. May be negative.
        enable_gqa: allow H to be a multiple of Hkv; consecutive query heads then share a head of k and v.
        window: query i stands at position i ("bottom_right": i + Skv - Sq). An int w: it sees keys less than w away.
            A tuple (left, right): from position - left to position + right, -1 for no limit.
        softcap: c > 0 replaces a score s by c · tanh(s / c), before the mask.
        return_lse: also return the natural logarithm of each softmax's denominator, Σ exp(score).

    Returns:
        [B, H, Sq, Dv] in the type of q, in memory [B, Sq, H, Dv], so that joining the heads copies nothing (where
        torch computes it, as torch likes); with return_lse also [B, H, Sq] float32.

        A query that sees no key gives zeros, and -inf for return_lse. A query that holds NaN or infinity gives NaN, and
        a key or value token that does gives NaN to all queries that see it, and to no other; on a GPU it may spoil
        other queries too.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown option, D above 256. Both before
        anything is computed. Inference only: backward raises.
    """
    op = "quantized_attention"
    h, hkv, sq, skv, d = check_heads(op, q, k, v, enable_gqa)
    cuda = bits == "auto" and q.is_cuda
    short = bits == "auto" and not cuda and mask is None and not return_lse and is_short(h, hkv, sq, skv)
    if short and is_causal is False and window is None and softcap is None and scale is None:
        # Nothing is left to check: as much time as four heads take.
        return backend.call("short_attention", q, k, v, skv, 1 / math.sqrt(d or 1))
    if mask is not None:
        mask = expanded_mask(op, mask, (*q.shape[:3], skv))
    options = checked_options(op, 8 if cuda else bits, is_causal, window, softcap, scale, d)
    _, bottom_right, left, right, cap, factor = options
    if short and left < 0 and not cap:
        return backend.call("short_attention", q, k, v, keys_of_first(bottom_right, right, sq, skv), factor)
    if cuda and _in_floats(return_lse):
        return float_attention(
            q,
            k,
            v,
            mask=mask,
            is_causal=is_causal,
            scale=factor,
            enable_gqa=enable_gqa,
            window=window,
            softcap=softcap,
        )
    out, lse = backend.call(op, q, k, v, mask, *options, return_lse)
    return (out, lse) if return_lse else out


def _in_floats(return_lse: bool) -> bool:
    """Whether `bits="auto"` on a GPU is torch's attention, which has no logarithm to return."""
    return not return_lse and backend.forced() is None


def int8_attention(
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
    return_lse: bool = False,
) -> Any:
    """`quantized_attention` with `bits=8`, whatever the processor."""
    return quantized_attention(
        q,
        k,
        v,
        bits=8,
        mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
        window=window,
        softcap=softcap,
        return_lse=return_lse,
    )


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    kv = KeysAndValues.quantize(k, v, bits)
    out, lse = attend(q, kv, bits, mask, Visible(bottom_right, left, right), scale, softcap)
    return heads_last(out.to(q.dtype)), lse if return_lse else lse.new_empty(0)


def heads_last(out: torch.Tensor) -> torch.Tensor:
    """The same [B, H, S, D], laid out as [B, S, H, D]."""
    b, h, s, d = out.shape
    return out.new_empty((b, s, h, d)).copy_(out.transpose(1, 2)).transpose(1, 2)


def fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, sq, _ = q.shape
    lse = q.new_empty((b, h, sq) if return_lse else (0,), dtype=torch.float32)
    return q.new_empty((b, sq, h, v.shape[3])).transpose(1, 2), lse


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object) -> int:
    b, h, sq, d = q.shape
    return 2 * b * h * sq * k.shape[2] * (d + v.shape[3])


def nbytes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: object) -> int:
    b, h, sq, d = q.shape
    return (b * h * sq * (d + v.shape[3]) + k.numel() + v.numel()) * q.element_size()


define(
    Op(
        name="quantized_attention",
        schema=(
            "(Tensor q, Tensor k, Tensor v, Tensor? mask, int bits, bool bottom_right, int left, int right,"
            " float softcap, float scale, bool return_lse) -> (Tensor, Tensor)"
        ),
        reference=reference,
        fake=fake,
        # The result is the same bit for bit; the logarithm is the C library's or torch's.
        tolerance=4.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("quantized_attention", "cpu", unsupported=cpu_unsupported)


def _resolve(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *others: Any,  # the op's own arguments, where the bits are chosen
    bits: Bits = "auto",
    mask: torch.Tensor | None = None,
    is_causal: Causal = False,
    scale: float | None = None,
    enable_gqa: bool = True,
    window: Window = None,
    softcap: float | None = None,
    return_lse: bool = False,
) -> backend.Resolved:
    op = "quantized_attention"
    if others:
        return backend.Resolved(op, (q, k, v, *others))
    h, hkv, sq, skv, d = check_heads("explain", q, k, v, enable_gqa)
    cuda = bits == "auto" and q.is_cuda
    options = checked_options("explain", 8 if cuda else bits, is_causal, window, softcap, scale, d)
    _, bottom_right, left, right, cap, factor = options
    if bits == "auto" and not cuda and mask is None and not return_lse and is_short(h, hkv, sq, skv):  # noqa: SIM102
        if left < 0 and not cap:
            first = keys_of_first(bottom_right, right, sq, skv)
            return backend.Resolved("short_attention", (q, k, v, first, factor))
    mask = expanded_mask("explain", mask, (*q.shape[:3], skv))
    arguments = (q, k, v, mask, *options, return_lse)
    if cuda and _in_floats(return_lse):
        return backend.Resolved("scaled_dot_product_attention", arguments, FLOAT_ON_CUDA)
    return backend.Resolved(op, arguments)


backend.register_resolver("quantized_attention", _resolve)
