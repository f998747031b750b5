"""The loop over blocks of keys: scores in integers, blockwise softmax, values in 16-bit floats or in int8.

For BLOCK_M queries in registers, each step takes BLOCK_N keys:

 1. x = Q Kᵀ                            int8 products, exact int32 sums; |x| <= 127 · 127 · 256 < 2^22, or, of Q and K
                                        in 12 bits, |x| < 2^30
 2. s = x · c, c = q_scale · k_scale    logarithms of base 2; c > 0, so the maximum is taken of x
 3. p = 2^(s - top), top the running maximum
 4. sums and output so far times 2^(old top - top), plus p and p V

Two forms. `plain`, for blocks in which every query sees every key: the float of x is made by adding BIAS to the integer
accumulator, and 2 and 3 are one fused multiply and add. What that rounds, 0.75 c, is the same for all keys of the
block and below one unit of x. (Sums of 12 bits are too large for that: they are converted, rounded to 24 bits.)
`masked`, for the edges of a window, the tail, masks and softcap: -inf where a query does not see a key; a query that
has seen none keeps top = -inf, and 0 is subtracted instead.

With ONES the plain loop leaves the sums of p to the matrix unit, as a product with ones: SUMS equal columns, of the p
that is multiplied with V. Of 8.x's loop that saves a tenth; on 9.0 it takes registers (attention_tiles).

INT8_V: 3 and 4 in 8 bits. A row of a block has a maximum of its own, 2^(s - maximum) is rounded to 127ths, and what
their products with V's integers sum up to, exactly, counts 2^(maximum - top). Sums are those of the rounded.

Papers: Milakov & Gimelshein, arXiv 1805.02867, section 3; Dao et al., arXiv 2205.14135, section 3.1; P and V in 8 bits,
Zhang et al. (SageAttention), arXiv 2410.02367, section 4.3.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import BIAS, biased_float, dot_12_bits

LOG2_E = tl.constexpr(1.4426950408889634)
#: What a finite entry of a float mask is at least, so that adding it does not hide the key.
LOWEST_MASK = tl.constexpr(-1.0e38)
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
#: Columns of ones: the fewest that the matrix unit takes.
SUMS = tl.constexpr(8)
#: log2(127): the largest weight of a row of a block in int8.
LOG2_P = tl.constexpr(6.988684686772166)


@triton.jit
def _scores_12_bits(q, q_low, k_at, DP: tl.constexpr):
    """Of a block of keys, whose rows have their low bytes behind the high ones; rounded to float32."""
    k, k_low = tl.load(k_at), tl.load(k_at + DP)
    return dot_12_bits(q, q_low, tl.trans(k), tl.trans(k_low)).to(tl.float32)


@triton.jit
def softcapped(s, softcap):
    """softcap · tanh(s / softcap) of scores in logarithms of base 2."""
    e = tl.math.exp2(tl.abs(s) * (-2.0 / softcap))
    magnitude = (1.0 - e) / (1.0 + e) * (softcap * LOG2_E)
    return tl.where(s < 0, -magnitude, magnitude)


@triton.jit
def _add_block(acc, total, keep, p, v, ONES: tl.constexpr):
    weights = p.to(v.dtype)
    if ONES:
        total = tl.dot(weights, tl.full([p.shape[1], SUMS], 1.0, tl.float32).to(v.dtype), total * keep[:, None])
    else:
        total = total * keep + tl.sum(p, 1)
    return tl.dot(weights, v, acc * keep[:, None]), total


@triton.jit
def _add_int8_block(acc, total, keep, share, p, v, ONES: tl.constexpr):
    """p [BLOCK_M, BLOCK_N]: up to 127, to be rounded; what it adds counts `share`. A NaN among p stays in the sums
    that are not ONES; then so does it in the quotient."""
    biased = p + BIAS
    weights = biased.to(tl.int32, bitcast=True).to(tl.int8)  # the bits' lowest byte
    if ONES:
        sums = tl.dot(weights, tl.full([p.shape[1], SUMS], 1, tl.int8), out_dtype=tl.int32)
        total = total * keep[:, None] + sums.to(tl.float32) * share[:, None]
    else:
        total = total * keep + tl.sum(biased - BIAS, 1) * share
    # at most 127 · 127 · 256 < 2^22
    products = biased_float(tl.dot(weights, v, out_dtype=tl.int32))
    # BIAS is taken off in the same fused multiply-add that rescales: it rounds by a half of a product of 127²
    return products * share[:, None] + (acc * keep[:, None] - (share * BIAS)[:, None]), total


@triton.jit
def plain_blocks(
    acc, total, top, q, q_low, q_scale, k_at, k_scale_at, v_at, v_columns_ok, stride_v, low, high,
    BLOCK_N: tl.constexpr, DP: tl.constexpr, V_TAIL: tl.constexpr, ONES: tl.constexpr, INT8_V: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Keys from `low` to `high`, whole blocks that every query sees. INT8_V: `v_at` are those of [DVP, BLOCK_N]. With 8
    bits `q_low` is not read."""
    ZERO: tl.constexpr = BIAS if BITS == 8 else 0.0  # what x has for 0
    # read a step ahead, it does not pass through shared memory with K and V: 5 % fewer instructions, fewer registers
    last = high // BLOCK_N - 1
    k_scale = tl.load(k_scale_at + low // BLOCK_N, mask=low < high, other=0.0)
    for start in tl.range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        if BITS == 8:
            k = tl.load(k_at + start.to(tl.int64) * DP)
        c = q_scale * k_scale
        k_scale = tl.load(k_scale_at + tl.minimum(start // BLOCK_N + 1, last))
        if BITS == 8:
            x = biased_float(tl.dot(q, tl.trans(k), out_dtype=tl.int32))
        else:
            x = _scores_12_bits(q, q_low, k_at + start.to(tl.int64) * (2 * DP), DP)
        most = (tl.max(x, 1) - ZERO) * c
        new = tl.maximum(top, most)
        if INT8_V:
            p = tl.math.exp2(x * c[:, None] - (most - LOG2_P + ZERO * c)[:, None])
            v = tl.trans(tl.load(v_at + start))
            share = tl.math.exp2(most - new)
            acc, total = _add_int8_block(acc, total, tl.math.exp2(top - new), share, p, v, ONES)
        else:
            p = tl.math.exp2(x * c[:, None] - (new + ZERO * c)[:, None])
            if V_TAIL:
                v = tl.load(v_at + start.to(tl.int64) * stride_v, mask=v_columns_ok, other=0.0)
            else:
                v = tl.load(v_at + start.to(tl.int64) * stride_v)
            acc, total = _add_block(acc, total, tl.math.exp2(top - new), p, v, ONES)
        top = new
    return acc, total, top


@triton.jit
def masked_blocks(
    acc, total, top, q, q_low, q_scale, k_at, k_scale_at, v_at, v_columns_ok, stride_v, low, high,
    rows, sq, skv, last_seen, first_seen, shift, softcap, mask_at, mask_rows, stride_mask_n,
    BLOCK_N: tl.constexpr, DP: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    MASK: tl.constexpr, INT8_V: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Keys from `low`, the first of a block, to `high`. With LAST row i sees keys up to i + last_seen, with FIRST
    from i + first_seen on; there are `sq` rows. `mask_at` points to the first one's row of the mask, `mask_rows`
    [BLOCK_M, 1] are the distances of the others. SOFTCAP: `shift` [BLOCK_M] is what smoothing K took from a query's
    scores."""
    last = tl.cdiv(high, BLOCK_N) - 1
    k_scale = tl.load(k_scale_at + low // BLOCK_N, mask=low < high, other=0.0)
    for start in tl.range(low, high, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        keys = start + tl.arange(0, BLOCK_N)
        if BITS == 8:
            k = tl.load(k_at + start.to(tl.int64) * DP)
        c = q_scale * k_scale
        k_scale = tl.load(k_scale_at + tl.minimum(start // BLOCK_N + 1, last))
        if BITS == 8:
            s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * c[:, None]
        else:
            s = _scores_12_bits(q, q_low, k_at + start.to(tl.int64) * (2 * DP), DP) * c[:, None]
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
        most = tl.max(s, 1)
        new = tl.maximum(top, most)
        floor = tl.where(new == float("-inf"), 0.0, new)
        keep = tl.math.exp2(top - floor)
        if INT8_V:
            p = tl.math.exp2(s - (tl.where(most == float("-inf"), 0.0, most) - LOG2_P)[:, None])
            v = tl.trans(tl.load(v_at + start))
            acc, total = _add_int8_block(acc, total, keep, tl.math.exp2(most - floor), p, v, False)
        else:
            p = tl.math.exp2(s - floor[:, None])
            v_ok = (keys < skv)[:, None] & v_columns_ok
            v = tl.load(v_at + start.to(tl.int64) * stride_v, mask=v_ok, other=0.0)
            acc, total = _add_block(acc, total, keep, p, v, False)
        top = new
    return acc, total, top
