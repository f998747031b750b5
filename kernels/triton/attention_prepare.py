"""Q and K to integers: what runs before the attention kernel, in two launches.

    q [B, H, Sq, D]    ->  [B·H, Sqp, Dp] int8     scale [B·H, Sqp]: a token's own, times |scale of the scores| · log2 e
    k [B, Hkv, Skv, D] ->  [B·Hkv, Skp, Dp] int8   scale [B·Hkv, Skp / BLOCK_N]: one a block of keys

    12 bits: [.., 2 · Dp], a token's high bytes, then its low ones (`numbers.split_12_bits`)

Dp: D up to a power of two, at least 32. Sqp, Skp: up to whole blocks. All padding is 0, so the attention kernel loads
Q and K without a mask. One scale a block of keys rather than a key: the running maximum is then taken before scaling,
and the inner loop multiplies once. Queries have one each: there it costs nothing.

 1. key_sums: sums of K over pieces of the tokens; a fixed order, no atomics, so the result is always the same.
 2. quantize: a program takes a block of queries, or a block of keys less their mean. The mean is put together from the
    pieces by every program; a channel whose mean is not finite is not smoothed.

Smoothing K leaves the softmax as it is but takes `scale · q·mean` from the logarithm of its denominator; SHIFT gives
it back. A query that is not finite has scale NaN; so has a block of keys with a key that is not, and every query that
sees a key of the block becomes NaN.

Paper: Zhang et al. (SageAttention), arXiv 2410.02367, section 4.2.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .numbers import all_finite, finite, reciprocal, round_half_even, split_12_bits, steps

LOG2_E = math.log2(math.e)
#: Tokens a program sums; more where that would make more than MOST_PIECES.
PIECE = 256
MOST_PIECES = 32
SUM_TOKENS = 64
QUERY_ROWS = 64


class Integers(NamedTuple):
    """Q and K as the attention kernel reads them; see the head of this file."""

    q: torch.Tensor
    q_scale: torch.Tensor
    k: torch.Tensor
    k_scale: torch.Tensor
    shift: torch.Tensor | None


@triton.jit(do_not_specialize=["skv", "heads", "piece"])
def key_sums(
    K, SUMS, skv, d, heads, stride_b, stride_h, stride_s, stride_d, piece,
    TOKENS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    bh, part = tl.program_id(0), tl.program_id(1)
    base = K + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    channels = tl.arange(0, DP)
    total = tl.zeros([TOKENS, DP], tl.float32)
    for start in range(part * piece, tl.minimum(skv, (part + 1) * piece), TOKENS):
        tokens = (start + tl.arange(0, TOKENS))[:, None]
        at = base + tokens.to(tl.int64) * stride_s + channels[None, :] * stride_d
        total += tl.load(at, mask=(tokens < skv) & (channels[None, :] < d), other=0.0).to(tl.float32)
    tl.store(SUMS + (bh * tl.num_programs(1) + part) * DP + channels, tl.sum(total, 0))


@triton.jit
def _mean(SUMS, bh, parts, inverse_skv, PARTS: tl.constexpr, DP: tl.constexpr):
    part = tl.arange(0, PARTS)[:, None]
    at = SUMS + (bh * parts + part) * DP + tl.arange(0, DP)[None, :]
    mean = tl.sum(tl.load(at, mask=part < parts, other=0.0), 0) * inverse_skv
    return tl.where(finite(mean), mean, 0.0)


@triton.jit
def _store_integers(OUT, x, row, DP: tl.constexpr, BITS: tl.constexpr):
    channels = tl.arange(0, DP)[None, :]
    if BITS == 8:
        tl.store(OUT + row[:, None] * DP + channels, x.to(tl.int8))
    else:
        high, low = split_12_bits(x.to(tl.int32))
        at = OUT + row[:, None] * (2 * DP) + channels
        tl.store(at, high)
        tl.store(at + DP, low)


@triton.jit
def store_queries(
    X, Q, Q_SCALE, SHIFT, SUMS, inside, x_at, row, parts, inverse_skv, unit, sign, kv,
    STEP: tl.constexpr, LOWEST: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    x = tl.load(X + x_at, mask=inside, other=0.0).to(tl.float32)
    ok = all_finite(x, 1)
    scale = tl.maximum(tl.max(tl.abs(x), 1) * STEP, LOWEST)
    inverse = tl.where(ok, reciprocal(scale), 0.0)
    q = round_half_even(tl.where(ok[:, None], x, 0.0) * inverse[:, None])  # at most q_max: see quantize_tokens
    _store_integers(Q, q * sign, row, DP, BITS)
    tl.store(Q_SCALE + row, tl.where(ok, scale * unit, float("nan")))
    if HAS_SHIFT:
        mean = _mean(SUMS, kv, parts, inverse_skv, PARTS, DP)
        tl.store(SHIFT + row, tl.sum(x * mean[None, :], 1))


@triton.jit
def store_keys(
    X, K, K_SCALE, SUMS, bh, inside, x_at, row, block, parts, inverse_skv,
    STEP: tl.constexpr, LOWEST: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    x = tl.load(X + x_at, mask=inside, other=0.0).to(tl.float32)
    x = tl.where(inside, x - _mean(SUMS, bh, parts, inverse_skv, PARTS, DP)[None, :], 0.0)
    ok = tl.min(all_finite(x, 1).to(tl.int32), 0) != 0
    scale = tl.maximum(tl.max(tl.max(tl.abs(x), 1), 0) * STEP, LOWEST)
    inverse = tl.where(ok, reciprocal(scale), 0.0)
    q = round_half_even(tl.where(ok, x, 0.0) * inverse)
    _store_integers(K, q, row, DP, BITS)
    tl.store(K_SCALE + block, tl.where(ok, scale, float("nan")))


@triton.jit(
    do_not_specialize=[
        "sq", "skv", "heads", "kv_heads", "q_blocks", "k_blocks", "q_programs", "parts", "inverse_skv", "unit", "sign"
    ]
)  # fmt: skip
def quantize_queries_and_keys(
    X_Q, X_K, SUMS, Q, Q_SCALE, K, K_SCALE, SHIFT,
    sq, skv, d, heads, kv_heads, q_blocks, k_blocks, q_programs, parts, inverse_skv, unit, sign,
    q_stride_b, q_stride_h, q_stride_s, q_stride_d, k_stride_b, k_stride_h, k_stride_s, k_stride_d,
    STEP: tl.constexpr, LOWEST: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr, PARTS: tl.constexpr, HAS_SHIFT: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    channels = tl.arange(0, DP)[None, :]
    if pid < q_programs:
        q_bh = pid // q_blocks
        b, h = q_bh // heads, q_bh % heads
        q_rows = (pid % q_blocks) * ROWS + tl.arange(0, ROWS)
        q_at = b.to(tl.int64) * q_stride_b + h.to(tl.int64) * q_stride_h
        q_at = q_at + q_rows.to(tl.int64)[:, None] * q_stride_s + channels * q_stride_d
        store_queries(
            X_Q, Q, Q_SCALE, SHIFT, SUMS, (q_rows < sq)[:, None] & (channels < d), q_at,
            q_bh.to(tl.int64) * (q_blocks * ROWS) + q_rows, parts, inverse_skv, unit, sign,
            b * kv_heads + h // (heads // kv_heads), STEP, LOWEST, DP, PARTS, HAS_SHIFT, BITS,
        )  # fmt: skip
    else:
        block = pid - q_programs
        k_bh = block // k_blocks
        k_rows = (block % k_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        k_at = (k_bh // kv_heads).to(tl.int64) * k_stride_b + (k_bh % kv_heads).to(tl.int64) * k_stride_h
        k_at = k_at + k_rows.to(tl.int64)[:, None] * k_stride_s + channels * k_stride_d
        store_keys(
            X_K, K, K_SCALE, SUMS, k_bh, (k_rows < skv)[:, None] & (channels < d), k_at,
            k_bh.to(tl.int64) * (k_blocks * BLOCK_N) + k_rows, block, parts, inverse_skv,
            STEP, LOWEST, DP, PARTS, BITS,
        )  # fmt: skip


def padded_head(d: int) -> int:
    """The head size that the tiles have: int8 products take at least 32."""
    return max(32, triton.next_power_of_2(d))


def row_bytes(dp: int, bits: int) -> int:
    """Of a token of Q or K."""
    return dp if bits == 8 else 2 * dp


def quantize(
    q: torch.Tensor, k: torch.Tensor, scale: float, block_m: int, block_n: int, with_shift: bool, bits: int = 8
) -> Integers:
    """Q and K as integers.

    Args:
        q, k: [B, H, Sq, D], [B, Hkv, Skv, D], any float type, any strides, not empty.
        scale: of the scores; may be negative.
        block_m, block_n: queries and keys of a tile of the attention kernel.
        with_shift: whether the logarithm of the denominator is wanted.
        bits: 8 or 12.
    """
    b, heads, sq, d = q.shape
    kv_heads, skv = k.shape[1], k.shape[2]
    dp, device = padded_head(d), q.device
    width, step, lowest = row_bytes(dp, bits), *steps(bits, True)[1:]
    rows = min(QUERY_ROWS, block_m)
    q_blocks, k_blocks = triton.cdiv(sq, block_m) * (block_m // rows), triton.cdiv(skv, block_n)
    piece = max(PIECE, triton.cdiv(triton.cdiv(skv, MOST_PIECES), SUM_TOKENS) * SUM_TOKENS)
    parts = triton.cdiv(skv, piece)
    sums = torch.empty((b * kv_heads, parts, dp), dtype=torch.float32, device=device)
    out = Integers(
        torch.empty((b * heads, q_blocks * rows, width), dtype=torch.int8, device=device),
        torch.empty((b * heads, q_blocks * rows), dtype=torch.float32, device=device),
        torch.empty((b * kv_heads, k_blocks * block_n, width), dtype=torch.int8, device=device),
        torch.empty((b * kv_heads, k_blocks), dtype=torch.float32, device=device),
        torch.empty((b * heads, q_blocks * rows), dtype=torch.float32, device=device) if with_shift else None,
    )
    key_sums[(b * kv_heads, parts)](
        k, sums, skv, d, kv_heads, *k.stride(), piece, TOKENS=SUM_TOKENS, DP=dp, num_warps=4
    )
    programs = b * heads * q_blocks
    quantize_queries_and_keys[(programs + b * kv_heads * k_blocks,)](
        q, k, sums, out.q, out.q_scale, out.k, out.k_scale, out.shift if with_shift else out.q_scale,
        sq, skv, d, heads, kv_heads, q_blocks, k_blocks, programs, parts, 1.0 / skv, abs(scale) * LOG2_E,
        -1.0 if scale < 0 else 1.0, *q.stride(), *k.stride(),
        STEP=step, LOWEST=lowest, ROWS=rows, BLOCK_N=block_n, DP=dp,
        PARTS=triton.next_power_of_2(parts), HAS_SHIFT=with_shift, BITS=bits,
        num_warps=8 if block_n * dp >= 8192 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
