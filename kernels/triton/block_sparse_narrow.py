"""Few tokens times a weight of which whole blocks are zero: int8, 4-bit or float. No matrix unit, of which one row in
sixteen would have work: a token needs each kept weight once, so reading them is all there is to do.

    a program: one token x one row of blocks (R outputs)

        kept blocks of the row, one after the other in memory   | b0 | b1 | … |     J a step, R·C values each
        activations [C] of each                                 panel column[b]

 1. J blocks and, for each, the C activations of its column.
 2. Sums along C: exact in int32, or float32. 4 bits: times the scale of the block's group, in float32.
 3. Sums over the blocks; scales, bias, activation, residual, one rounding: linear_finish.

The numbers are those of block_sparse_linear and int4_sparse_linear but for the order of float additions.

Constraints: theirs. Any number of tokens; made for up to `FEW_TOKENS`.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl

from . import autotune
from .int4_blocks import SYMMETRIC_ZERO
from .linear_finish import finish, finish_floats
from .tiles import TileConfig, TileTable

#: By rule, not measured: each token reads the weight again, from the second-level cache after the first.
FEW_TOKENS = 4
#: Values of a step: 32 a thread.
STEP = 4096

FLOATS, INT8, INT4 = (tl.constexpr(i) for i in range(3))


@triton.jit(do_not_specialize=["m", "panel_stride"])
def block_sparse_narrow(
    A, SCALE, ZERO, VALUES, START, COLUMN, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT,
    m, n, groups, group_columns, block_rows, panel_stride, stride_residual,
    R: tl.constexpr, C: tl.constexpr, J: tl.constexpr, KIND: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block_row, token = pid % block_rows, pid // block_rows
    rows, columns = token + tl.arange(0, 1), block_row * R + tl.arange(0, R)
    low, high = tl.load(START + block_row * groups), tl.load(START + (block_row + 1) * groups)
    zero = tl.zeros([1], tl.int32)
    if HAS_ZERO:
        zero = tl.load(ZERO + rows)
    acc = tl.zeros([J, R], tl.int32 if KIND == INT8 else tl.float32)
    for first in range(low, high, J):
        block = first + tl.arange(0, J)
        valid = block < high
        column = tl.load(COLUMN + block, mask=valid, other=0)
        a_at = A + column.to(tl.int64)[:, None] * panel_stride + (token * C + tl.arange(0, C))[None, :]
        a = tl.load(a_at, mask=valid[:, None], other=0)
        if KIND == INT4:
            at = block.to(tl.int64)[:, None] * (R * C // 2) + tl.arange(0, R * C // 2)[None, :]
            packed = tl.load(VALUES + at, mask=valid[:, None], other=0)
            w = tl.interleave(packed & 15, packed >> 4).to(tl.int32) - SYMMETRIC_ZERO
            x = a.to(tl.int32) - zero[:, None]
            group = block_row * R * groups + column // group_columns
            scale_at = group.to(tl.int64)[:, None] + (tl.arange(0, R) * groups)[None, :]
            there = valid[:, None] & (columns < n)[None, :]
            w_scale = tl.load(WEIGHT_SCALE + scale_at, mask=there, other=0.0).to(tl.float32)
            part = tl.sum(x[:, None, :] * tl.reshape(w, [J, R, C]), 2)
            # of a block that is not there the scale is zero
            acc += part.to(tl.float32) * w_scale
        else:
            at = block.to(tl.int64)[:, None] * (R * C) + tl.arange(0, R * C)[None, :]
            w = tl.reshape(tl.load(VALUES + at, mask=valid[:, None], other=0), [J, R, C])
            if KIND == INT8:
                acc += tl.sum(a.to(tl.int32)[:, None, :] * w.to(tl.int32), 2)
            else:
                acc += tl.sum(a.to(tl.float32)[:, None, :] * w.to(tl.float32), 2)
    y = tl.sum(acc, 0)[None, :]
    scale = tl.load(SCALE + rows)
    if KIND == INT8:
        finish(
            y, rows, columns, m, n, scale, zero, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, stride_residual,
            HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
        finish_floats(
            y * scale[:, None], rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual,
            HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


# `block_n` becomes R, `block_k` J · C, for `STEP` values; `block_m` is one token. By rule, not measured.
TILES = TileTable("block_sparse_narrow", {"one token": TileConfig(1, 8, STEP // 8, 4, 2)})


def narrow_tile(capability: int, size: tuple[int, int]) -> TileConfig:
    """For blocks of that size."""
    r, c = size
    return replace(TILES.tile(capability, "one token"), block_n=r, block_k=max(STEP // r, 2 * c))


def narrow_candidates(stored: TileConfig) -> list[TileConfig]:
    """Other tiles of this kernel."""
    return autotune.neighbours(stored, block_k=(stored.block_k // 2, stored.block_k * 2), warps=(1, 2, 8))
