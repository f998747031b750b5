"""int8 linear, few tokens: the weight is read once, and reading it is the work.

    weight [N, K] int8                    split 0      split 1
        channels  0 … BLOCK_N-1      | program 0   | program 1   |   SPLIT programs a slice of channels, so that all
        channels  BLOCK_N … 2·BLOCK_N-1 | program 2   | program 3   |   multiprocessors read also where N is small

 1. QUANTIZE, one token: x in floats; every program finds its range and quantizes what it reads, one launch in all.
    Else: integers from quantize_tokens.
 2. acc over the program's part of K.
 3. SPLIT > 1: add acc into PARTIAL [tiles, BLOCK_M, BLOCK_N] int32, which is exact in any order; the program that
    finds all others of the slice done reads the sum. PARTIAL and DONE [tiles] start as zeros.
 4. linear_finish

M <= BLOCK_M: there is one tile of tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_finish import finish
from .numbers import finite
from .quantize_tokens import integers, scale_of_range

#: Values of a token read at a time to find its range.
RANGE_BLOCK = tl.constexpr(2048)


@triton.jit
def range_of_token(X, k, stride_k, BLOCK: tl.constexpr):
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    ok = tl.full([BLOCK], 1, tl.int1)
    for start in range(0, k, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(X + at.to(tl.int64) * stride_k, mask=at < k, other=0.0).to(tl.float32)
        low = tl.minimum(low, x)
        high = tl.maximum(high, x)
        ok = ok & finite(x)
    return tl.min(low, 0), tl.max(high, 0), tl.min(ok.to(tl.int32), 0) != 0


@triton.jit(do_not_specialize=["m"])
def linear_narrow(
    A, SCALE, ZERO, WEIGHT, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, PARTIAL, DONE,
    m, n, k, k_part, stride_a, stride_ak, stride_w, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, WHOLE_K: tl.constexpr,
    QUANTIZE: tl.constexpr, Q_MAX: tl.constexpr, STEP: tl.constexpr, LOWEST: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """k_part: a program's part of K, whole blocks. WHOLE_K: K is whole parts."""
    tile, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    rows = tl.arange(0, BLOCK_M)
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    a_at = A + rows.to(tl.int64)[:, None] * stride_a + ks[None, :]
    # beyond the end the last channel is read again, and nothing of it is stored
    w_at = WEIGHT + tl.minimum(columns, n - 1).to(tl.int64)[:, None] * stride_w + ks[None, :]
    inside_m = (rows < m)[:, None]
    if QUANTIZE:
        low, high, ok = range_of_token(A, k, stride_ak, RANGE_BLOCK)
        token_scale, inverse, token_zero = scale_of_range(low, high, ok, STEP, LOWEST, not HAS_ZERO)
        scale = tl.zeros([BLOCK_M], tl.float32) + token_scale
        zero = (tl.zeros([BLOCK_M], tl.float32) + token_zero).to(tl.int32)
    else:
        scale = tl.load(SCALE + rows, mask=rows < m, other=0.0)
        zero = tl.load(ZERO + rows, mask=rows < m, other=0)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(split * k_part, tl.minimum(k, (split + 1) * k_part), BLOCK_K):
        if WHOLE_K:
            w = tl.load(w_at + start)
        else:
            w = tl.load(w_at + start, mask=(start + ks < k)[None, :], other=0)
        if QUANTIZE:
            x = tl.load(A + (start + ks).to(tl.int64) * stride_ak, mask=start + ks < k, other=0.0).to(tl.float32)
            # where x ends its zero point meets a weight of 0; all rows of the tile are the one token
            token = integers(x, ok, inverse, token_zero, Q_MAX, not HAS_ZERO)
            a = tl.broadcast_to(token[None, :], [BLOCK_M, BLOCK_K])
        elif WHOLE_K:
            a = tl.load(a_at + start, mask=inside_m, other=0)
        else:
            a = tl.load(a_at + start, mask=inside_m & (start + ks < k)[None, :], other=0)
        acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)

    last = True
    if SPLIT > 1:
        cells = tile.to(tl.int64) * (BLOCK_M * BLOCK_N) + rows[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.atomic_add(PARTIAL + cells, acc, mask=inside_m & (columns < n)[None, :], sem="relaxed")
        # every thread's additions come before the count of one
        tl.debug_barrier()
        last = tl.atomic_add(DONE + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            # past the first-level cache, which may hold what was there before
            acc = tl.load(PARTIAL + cells, mask=inside_m, other=0, cache_modifier=".cg")
        finish(
            acc, rows, columns, m, n, scale, zero, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, stride_residual,
            HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
