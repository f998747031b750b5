"""The loop over blocks of keys: scores in integers, blockwise softmax, values in 16-bit floats.

For BLOCK_M queries in registers, each step takes BLOCK_N keys:

 1. x = Q Kᵀ                            int8 products, exact int32 sums; |x| <= 127 · 127 · 256 < 2^22
 2. s = x · c, c = q_scale · k_scale    logarithms of base 2; c > 0, so the maximum is taken of x
 3. p = 2^(s - top), top the running maximum
 4. sums and output so far times 2^(old top - top), plus p and p V

Two forms. `plain`, for blocks in which every query sees every key: the float of x is made by adding BIAS to the integer
accumulator, and 2 and 3 are one fused multiply and add. What that rounds, 0.75 c, is the same for all keys of the
block and below one unit of x. `masked`, for the edges of a window, the tail, masks and softcap: -inf where a query does
not see a key; a query that has seen none keeps top = -inf, and 0 is subtracted instead.

Papers: Milakov & Gimelshein, arXiv 1805.02867, section 3; Dao et al., arXiv 2205.14135, section 3.1.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import BIAS, biased_float

LOG2_E = tl.constexpr(1.4426950408889634)
#: What a finite entry of a float mask is at least, so that adding it does not hide the key.
LOWEST_MASK = tl.constexpr(-1.0e38)
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def softcapped(s, softcap):
    """softcap · tanh(s / softcap) of scores in logarithms of base 2."""
    e = tl.math.exp2(tl.abs(s) * (-2.0 / softcap))
    magnitude = (1.0 - e) / (1.0 + e) * (softcap * LOG2_E)
    return tl.where(s < 0, -magnitude, magnitude)


@triton.jit
def _accumulate(acc, total, keep, p, v):
    total = total * keep + tl.sum(p, 1)
    return tl.dot(p.to(v.dtype), v, acc * keep[:, None]), total


@triton.jit
def plain_blocks(
    acc, total, top, q, q_scale, k_at, k_scale_at, v_at, v_columns_ok, stride_v, low, high,
    BLOCK_N: tl.constexpr, DP: tl.constexpr, V_TAIL: tl.constexpr,
):  # fmt: skip
    """Keys from `low` to `high`, whole blocks that every query sees."""
    # read a step ahead, it does not pass through shared memory with K and V: 5 % fewer instructions, fewer registers
    last = tl.maximum(high // BLOCK_N - 1, 0)
    k_scale = tl.load(k_scale_at + tl.minimum(low // BLOCK_N, last))
    for start in tl.range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        k = tl.load(k_at + start.to(tl.int64) * DP)
        c = q_scale * k_scale
        k_scale = tl.load(k_scale_at + tl.minimum(start // BLOCK_N + 1, last))
        x = biased_float(tl.dot(q, tl.trans(k), out_dtype=tl.int32))
        new = tl.maximum(top, (tl.max(x, 1) - BIAS) * c)
        p = tl.math.exp2(x * c[:, None] - (new + BIAS * c)[:, None])
        if V_TAIL:
            v = tl.load(v_at + start.to(tl.int64) * stride_v, mask=v_columns_ok, other=0.0)
        else:
            v = tl.load(v_at + start.to(tl.int64) * stride_v)
        acc, total = _accumulate(acc, total, tl.math.exp2(top - new), p, v)
        top = new
    return acc, total, top


@triton.jit
def masked_blocks(
    acc, total, top, q, q_scale, k_at, k_scale_at, v_at, v_columns_ok, stride_v, low, high,
    rows, sq, skv, last_seen, first_seen, shift, softcap, mask_at, mask_rows, stride_mask_n,
    BLOCK_N: tl.constexpr, DP: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Keys from `low`, the first of a block, to `high`. With LAST query i sees keys up to i + last_seen, with FIRST
    from i + first_seen on. `mask_at` points to the first query's row of the mask, `mask_rows` [BLOCK_M, 1] are the
    distances of the others. SOFTCAP: `shift` [BLOCK_M] is what smoothing K took from a query's scores."""
    for start in tl.range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        k = tl.load(k_at + start.to(tl.int64) * DP)
        c = q_scale * tl.load(k_scale_at + start // BLOCK_N)
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * c[:, None]
        if SOFTCAP:
            s = softcapped(s + shift[:, None], softcap)
        seen = (keys < skv)[None, :]
        if LAST:
            seen = seen & (keys[None, :] <= rows[:, None] + last_seen)
        if FIRST:
            seen = seen & (keys[None, :] >= rows[:, None] + first_seen)
        if MASK != NO_MASK:
            inside = (rows < sq)[:, None] & (keys < skv)[None, :]
            entry_at = mask_at + start.to(tl.int64) * stride_mask_n
            entry_at = entry_at + (mask_rows + tl.arange(0, BLOCK_N)[None, :] * stride_mask_n)
            entry = tl.load(entry_at, mask=inside, other=0)
            if MASK == BOOL_MASK:
                seen = seen & (entry != 0)
            else:
                added = entry.to(tl.float32)
                seen = seen & (added != float("-inf"))
                # NaN stays: it fails the comparison
                s = s + tl.where(added * LOG2_E < LOWEST_MASK, LOWEST_MASK, added * LOG2_E)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        floor = tl.where(new == float("-inf"), 0.0, new)
        p = tl.math.exp2(s - floor[:, None])
        keep = tl.math.exp2(top - floor)
        v = tl.load(v_at + start.to(tl.int64) * stride_v, mask=(keys < skv)[:, None] & v_columns_ok, other=0.0)
        acc, total = _accumulate(acc, total, keep, p, v)
        top = new
    return acc, total, top
