"""int4 linear, many tokens: a tile of BLOCK_M tokens x BLOCK_N channels a program; W4A8 and W4A16.

    x [M, K], floats, or integers of quantize_tokens with rows of whole 16-byte words; weight as in int4_blocks
    order of the tiles as in linear_wide

 1. acc = Σ over groups of (Σ over the group of x · (w - zero point)) · scale of the group, see int4_blocks
 2. W4A8: times the token's scale
 3. linear_finish

Constraints: BLOCK_K divides the group size, or there is one group. K <= 65536, so that a group's sum fits int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .int4_blocks import centred_floats, centred_integers, load_group, load_nibbles
from .linear_finish import finish_floats


@triton.jit(do_not_specialize=["m"])
def int4_wide(
    A, SCALE, ZERO, WEIGHT, WEIGHT_SCALE, WEIGHT_ZERO, BIAS, RESIDUAL, OUT,
    m, n, k, groups, stride_a, stride_w, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WHOLE_K: tl.constexpr,
    GROUP_SIZE: tl.constexpr, INTEGERS: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_WEIGHT_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    m_tiles, n_tiles = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * n_tiles) * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    within = pid % (GROUP * n_tiles)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)[None, :]
    # beyond the end the last row is read again: no mask in the loop, and nothing of it is stored
    a_at = A + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * stride_a + ks
    channel = tl.minimum(columns, n - 1).to(tl.int64)
    w_at = WEIGHT + channel[:, None] * stride_w
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    part = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    if INTEGERS and HAS_ZERO:
        zero = tl.load(ZERO + tl.minimum(rows, m - 1))[:, None]
    for start in range(0, k, BLOCK_K):
        nibbles = load_nibbles(w_at, start, k, BLOCK_K, WHOLE_K)
        w_scale, w_zero = load_group(WEIGHT_SCALE, WEIGHT_ZERO, channel * groups + start // GROUP_SIZE, HAS_WEIGHT_ZERO)
        if WHOLE_K:
            a = tl.load(a_at + start)
        else:
            a = tl.load(a_at + start, mask=start + ks < k, other=0)
        if INTEGERS:
            if HAS_ZERO:
                a = (a - zero).to(tl.int8)
            w = centred_integers(nibbles, w_zero, start, k, BLOCK_K, WHOLE_K)
            if BLOCK_K == GROUP_SIZE:
                part = tl.dot(a, tl.trans(w), out_dtype=tl.int32)
                acc += part.to(tl.float32) * w_scale[None, :]
            else:
                part = tl.dot(a, tl.trans(w), part, out_dtype=tl.int32)
                if (start + BLOCK_K) % GROUP_SIZE == 0 or start + BLOCK_K >= k:
                    acc += part.to(tl.float32) * w_scale[None, :]
                    part = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        else:
            w = centred_floats(nibbles, w_zero, start, k, a.dtype, BLOCK_K, WHOLE_K)
            acc += tl.dot(a, tl.trans(w), input_precision="ieee") * w_scale[None, :]
    if INTEGERS:
        acc = acc * tl.load(SCALE + rows, mask=rows < m, other=0.0)[:, None]
    finish_floats(
        acc, rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
    )  # fmt: skip
