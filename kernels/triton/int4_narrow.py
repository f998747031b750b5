"""int4 linear, few tokens: the weight is read once, K split over programs; one token without the matrix unit.

    weight [N, ceil(K/2)]                  split 0      split 1
        channels  0 … BLOCK_N-1         | program 0   | program 1   |
        channels  BLOCK_N … 2·BLOCK_N-1 | program 2   | program 3   |

 1. QUANTIZE, one token in W4A8: x in floats; every program finds its range and quantizes what it reads.
 2. acc over the program's part of K, whole groups, as in int4_wide. BLOCK_M = 1: products on vectors.
 3. SPLIT > 1: split_k, in a fixed order, so that the result is the same in every run.
 4. W4A8: times the token's scale; linear_finish.

Constraints: M <= BLOCK_M; BLOCK_K divides the group size, or there is one group. K <= 65536.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .int4_blocks import centred_floats, centred_integers, load_group, load_nibbles
from .linear_finish import finish_floats
from .linear_narrow import RANGE_BLOCK, range_of_token
from .quantize_tokens import integers, scale_of_range
from .split_k import sum_of_splits


@triton.jit
def _products(a, w, BLOCK_M: tl.constexpr):
    """a [BLOCK_M, K] times w [N, K]: int32 of int8, float32 of floats."""
    if BLOCK_M == 1:
        if a.dtype == tl.int8:
            return tl.sum(a.to(tl.int32) * w.to(tl.int32), 1)[None, :]
        else:
            return tl.sum(a.to(tl.float32) * w.to(tl.float32), 1)[None, :]
    elif a.dtype == tl.int8:
        return tl.dot(a, tl.trans(w), out_dtype=tl.int32)
    else:
        return tl.dot(a, tl.trans(w), input_precision="ieee")


@triton.jit(do_not_specialize=["m"])
def int4_narrow(
    A, SCALE, ZERO, WEIGHT, WEIGHT_SCALE, WEIGHT_ZERO, BIAS, RESIDUAL, OUT, PARTIAL, DONE,
    m, n, k, k_part, groups, stride_a, stride_w, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, WHOLE_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr, INTEGERS: tl.constexpr, QUANTIZE: tl.constexpr, Q_MAX: tl.constexpr, STEP: tl.constexpr,
    LOWEST: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_WEIGHT_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tile, split = pid // SPLIT, pid % SPLIT
    rows, columns = tl.arange(0, BLOCK_M), tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)[None, :]
    a_at = A + rows.to(tl.int64)[:, None] * stride_a + ks
    channel = tl.minimum(columns, n - 1).to(tl.int64)
    w_at = WEIGHT + channel[:, None] * stride_w
    inside_m = (rows < m)[:, None]
    scale = tl.full([BLOCK_M], 1.0, tl.float32)
    zero = tl.zeros([BLOCK_M], tl.int32)
    if QUANTIZE:
        low, high, ok = range_of_token(A, k, 1, RANGE_BLOCK)
        token_scale, inverse, token_zero = scale_of_range(low, high, ok, STEP, LOWEST, not HAS_ZERO)
        scale = scale * token_scale
        zero = zero + token_zero.to(tl.int32)
    elif INTEGERS:
        scale = tl.load(SCALE + rows, mask=rows < m, other=0.0)
        zero = tl.load(ZERO + rows, mask=rows < m, other=0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    part = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    high_k = tl.minimum(k, (split + 1) * k_part)
    for start in range(split * k_part, high_k, BLOCK_K):
        nibbles = load_nibbles(w_at, start, k, BLOCK_K, WHOLE_K)
        w_scale, w_zero = load_group(WEIGHT_SCALE, WEIGHT_ZERO, channel * groups + start // GROUP_SIZE, HAS_WEIGHT_ZERO)
        if WHOLE_K:
            a = tl.load(a_at + start, mask=inside_m, other=0)
        else:
            a = tl.load(a_at + start, mask=inside_m & (start + ks < k), other=0)
        if INTEGERS:
            if QUANTIZE:
                a = integers(a.to(tl.float32), ok, inverse, token_zero, Q_MAX, not HAS_ZERO)
            if HAS_ZERO:
                a = (a - zero[:, None]).to(tl.int8)
            w = centred_integers(nibbles, w_zero, start, k, BLOCK_K, WHOLE_K)
            part += _products(a, w, BLOCK_M)
            if (start + BLOCK_K) % GROUP_SIZE == 0 or start + BLOCK_K >= high_k:
                acc += part.to(tl.float32) * w_scale[None, :]
                part = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        else:
            w = centred_floats(nibbles, w_zero, start, k, a.dtype, BLOCK_K, WHOLE_K)
            acc += _products(a, w, BLOCK_M) * w_scale[None, :]

    last = True
    if SPLIT > 1:
        acc, last = sum_of_splits(acc, PARTIAL, DONE, tile, split, SPLIT, BLOCK_M, BLOCK_N)
    if last:
        if INTEGERS:
            acc = acc * scale[:, None]
        finish_floats(
            acc, rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
        )  # fmt: skip
