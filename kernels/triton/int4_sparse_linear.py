"""Linear layer with a 4-bit weight of which whole blocks are zero, activations quantized: the op `int4_sparse_linear`.

    block of 8 outputs x 4 inputs, 16 bytes:   o0: k0|k1 k2|k3   o1: k0|k1 k2|k3   …   o7      the even k in the low
    nibble, 8 added; start [rows · groups + 1]: the first kept block of each row of blocks and group of K (block_panels)

 1. quantize_tokens: activations in panels of 4 columns.
 2. For each group: J kept blocks a step, nibbles less 8; exact int32 sums of the whole group, times its scale.
 3. Times the token's scale; linear_finish.

Up to a few tokens go through block_sparse_narrow instead: it does not wait for one group after the other.

Constraints (`unsupported`): blocks of 8, 16, 32 or 64 outputs x 4, 8 or 16 inputs; groups of a multiple of the block,
or one; no zero points. Any number of tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import autotune
from . import block_sparse_linear as blocks
from .block_panels import BlockRows, load_panels
from .block_sparse_narrow import FEW_TOKENS, INT4, block_sparse_narrow, narrow_candidates, narrow_tile
from .int4_blocks import SYMMETRIC_ZERO
from .linear_finish import ACTIVATIONS, finish_floats
from .numbers import capability
from .quantize_tokens import quantize_tokens
from .tiles import TileConfig, TileTable


@triton.jit(do_not_specialize=["m", "panel_stride"])
def int4_block_sparse(
    A, SCALE, ZERO, VALUES, START, COLUMN, WEIGHT_SCALE, BIAS, RESIDUAL, OUT,
    m, n, groups, block_rows, panel_stride, stride_residual,
    BLOCK_M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, J: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block_row, first_row = pid % block_rows, pid // block_rows * BLOCK_M
    rows, columns = first_row + tl.arange(0, BLOCK_M), block_row * R + tl.arange(0, R)
    if HAS_ZERO:
        zero = tl.load(ZERO + rows, mask=rows < m, other=0)[:, None]
    acc = tl.zeros([BLOCK_M, R], tl.float32)
    for group in range(groups):
        low = tl.load(START + block_row * groups + group)
        high = tl.load(START + block_row * groups + group + 1)
        part = tl.zeros([BLOCK_M, R], tl.int32)
        for first in range(low, high, J):
            block = first + tl.arange(0, J)
            valid = block < high
            column = tl.load(COLUMN + block, mask=valid, other=0)
            a = load_panels(A, column, valid, first_row, panel_stride, BLOCK_M, C, J)
            if HAS_ZERO:
                a = (a - zero).to(tl.int8)
            at = block.to(tl.int64)[:, None] * (R * C // 2) + tl.arange(0, R * C // 2)[None, :]
            packed = tl.load(VALUES + at, mask=valid[:, None], other=0)
            w = tl.interleave(packed & 15, packed >> 4).to(tl.int8) - SYMMETRIC_ZERO
            w = tl.where(valid[:, None], w, 0).to(tl.int8)
            w = tl.reshape(tl.permute(tl.reshape(w, [J, R, C]), (1, 0, 2)), [R, J * C])
            part = tl.dot(a, tl.trans(w), part, out_dtype=tl.int32)
        w_scale = tl.load(WEIGHT_SCALE + columns.to(tl.int64) * groups + group, mask=columns < n, other=0.0)
        acc += part.to(tl.float32) * w_scale.to(tl.float32)[None, :]
    acc = acc * tl.load(SCALE + rows, mask=rows < m, other=0.0)[:, None]
    finish_floats(
        acc, rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
    )  # fmt: skip


def unsupported(pattern: str, k: int, group_size: int) -> str | None:
    """Why this kernel cannot take a weight with such a pattern, K inputs and scales in such groups, or None."""
    reason = blocks.unsupported(pattern, torch.int8)
    if reason is None and group_size < k and group_size % int(pattern.split("x")[1]):
        return f"group_size={group_size}: a multiple of the {pattern} block along K"
    return reason


# `block_n` becomes R, `block_k` is J · C: a group of 128 with one block in four kept fills it. By rule, not measured.
TILES = TileTable("int4_sparse_linear", {str(m): TileConfig(m, 8, 32, 4, 2) for m in (16, 64)})


def int4_sparse_tile(capability: int, m: int, size: tuple[int, int], narrow: bool = True) -> TileConfig:
    """For M tokens and blocks of that size; `narrow`: few tokens may take the kernel without the matrix unit."""
    if narrow and m <= FEW_TOKENS:
        return narrow_tile(capability, size)
    return replace(TILES.tile(capability, "16" if m <= 16 else "64"), block_n=size[0])


def _candidates(stored: TileConfig, wide: TileConfig) -> list[TileConfig]:
    if stored.block_m == 1:
        return [*narrow_candidates(stored), wide]
    return autotune.neighbours(stored, block_k=(32, 64), warps=(2, 4), stages=(2, 3))


def int4_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    kept: BlockRows,
    weight_scale: torch.Tensor,
    size: tuple[int, int] = (8, 4),
    bias: torch.Tensor | None = None,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    tile: TileConfig | None = None,
    group_size: int = 0,
) -> torch.Tensor:
    """The numbers of `tcompress.ops.int4_sparse_linear`, for the storage layout; checked arguments.

    Args:
        x: [..., K], any float type, any strides.
        values: [blocks · R · C / 2] uint8, as stored. kept: `block_rows(mask, g / C)` of their places.
        weight_scale: [N, ceil(K/g)] float16 or float32.
        size: (R, C).
        act_bits, act_symmetric, activation, out_dtype, residual: as in `int4_linear`.
        tile: other than `autotune` chooses, which starts from `int4_sparse_tile`.
        group_size: g, a multiple of C or at least K; 0 where few tokens are to take the kernel of many.

    Returns:
        [..., N].
    """
    k, (n, groups) = x.shape[-1], weight_scale.shape
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, k) if k else x.new_zeros((x.shape[:-1].numel(), 1))
    m, (r, c) = rows.shape[0], size
    if tile is None:
        many = autotune.tokens(kept.column.numel())
        sizes = f"{autotune.tokens(m)}x{k}x{n} {size} {many} {x.dtype} {groups} {act_symmetric} {activation}"
        sizes += "" if group_size else " wide"
        arguments = (x, values, kept, weight_scale, size, bias, act_bits, act_symmetric, activation)
        stored = int4_sparse_tile(capability(x), m, size, group_size > 0)
        tile = autotune.choose(
            "int4_sparse_linear", sizes, stored,
            lambda: _candidates(stored, int4_sparse_tile(capability(x), m, size, False)),
            lambda tile: int4_sparse_linear(*arguments, out_dtype, residual, tile, group_size), x,
        )  # fmt: skip
    padded = triton.cdiv(m, tile.block_m) * tile.block_m
    a, scale, zero = quantize_tokens(rows, act_bits, act_symmetric, c, padded)
    if residual is not None:
        residual = residual.reshape(m, n)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    block_rows = triton.cdiv(n, r)
    operands = (a, scale, zero, values, kept.start, kept.column, weight_scale.contiguous())
    rest = (scale if bias is None else bias.contiguous(), scale if residual is None else residual, out)
    strides = (block_rows, padded * c, 0 if residual is None else residual.stride(0))
    options = {
        "R": r, "C": c, "J": tile.block_k // c, "HAS_ZERO": not act_symmetric, "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": residual is not None, "ACTIVATION": ACTIVATIONS.index(activation),
        "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    grid = (block_rows * (padded // tile.block_m),)
    if tile.block_m == 1:
        group_columns = max(group_size // c, 1)  # g >= K: every column is below that
        block_sparse_narrow[grid](
            *operands, scale, *rest, m, n, groups, group_columns, *strides, KIND=INT4.value, **options
        )
    else:
        int4_block_sparse[grid](*operands, *rest, m, n, groups, *strides, BLOCK_M=tile.block_m, **options)
    return out
