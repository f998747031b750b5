"""int8 linear, many tokens: a tile of BLOCK_M tokens x BLOCK_N channels a program.

   a [M, Kp] int8, rows of whole 16-byte words       weight [N, K] int8, the storage layout
   both with K along the row, which is what the 8-bit matrix instructions want: nothing is transposed

   order of the tiles: GROUP rows of tiles, column by column          0 3 6 |
   so that programs which run together share tokens and channels      1 4 7 |  GROUP = 3
   in the second-level cache                                          2 5 8 |

1. acc = Σ over blocks of K of a · weightᵀ, exact in int32 (K <= 65536)
2. linear_finish, of the left half of the tile and then of the right one where it is wide
"""

from __future__ import annotations

import triton
import triton.language as tl

from .linear_finish import finish

#: Channels of a tile from which on its two halves are finished one after the other: with 128 at once, gelu and the 128
#: registers of 9.0, 19 instructions spilled.
HALVED = tl.constexpr(128)


@triton.jit(do_not_specialize=["m"])
def linear_wide(
    A, SCALE, ZERO, WEIGHT, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT,
    m, n, k, stride_a, stride_w, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, WHOLE_K: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    m_tiles, n_tiles = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    first = pid // (GROUP * n_tiles) * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    within = pid % (GROUP * n_tiles)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    # beyond the end the last row is read again: no mask in the loop, and nothing of it is stored
    a_at = A + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * stride_a + ks[None, :]
    w_at = WEIGHT + tl.minimum(columns, n - 1).to(tl.int64)[:, None] * stride_w + ks[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for start in range(0, k, BLOCK_K):
        if WHOLE_K:
            a = tl.load(a_at + start)
            w = tl.load(w_at + start)
        else:
            inside = (start + ks < k)[None, :]
            a = tl.load(a_at + start, mask=inside, other=0)
            w = tl.load(w_at + start, mask=inside, other=0)
        acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
    scale = tl.load(SCALE + rows, mask=rows < m, other=0.0)
    zero = tl.load(ZERO + rows, mask=rows < m, other=0)
    if BLOCK_N >= HALVED:
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, [BLOCK_M, 2, HALF]), (0, 2, 1)))
        columns = (within // height) * BLOCK_N + tl.arange(0, HALF)
        finish(
            left, rows, columns, m, n, scale, zero, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, stride_residual,
            HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        columns += HALF
        acc = right
    finish(
        acc, rows, columns, m, n, scale, zero, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, stride_residual,
        HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip
