"""Linear layer with a weight of which whole blocks are zero, int8 or float: only kept blocks are read and multiplied.

    a program: BLOCK_M tokens x one row of blocks (R outputs)

        kept blocks of the row   | c=3 | c=7 | c=8 | c=20 |      J a step, wherever they lie along K
        panels of x                 3     7     8     20         block_panels: BLOCK_M · C values that lie together

 1. quantize_tokens (int8) or float_panels: activations in panels of C columns.
 2. J blocks and their panels, side by side along K: [BLOCK_M, J·C] times [J·C, R], exact in int32 or in float32.
 3. linear_finish. A float token that is not finite gives a row of NaN, as the ops' references say.

Up to a few tokens go through block_sparse_narrow instead.

Constraints (`unsupported`): blocks RxC with R 8, 16, 32 or 64 and C 4, 8 or 16; any number of tokens. Products in the
type of the weight where x has it too, else in float32; float32 without the matrix unit.
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import autotune
from .block_panels import BLOCK_COLUMNS, BLOCK_ROWS, BlockRows, load_panels, to_panels
from .block_sparse_narrow import FEW_TOKENS, FLOATS, INT8, block_sparse_narrow, narrow_candidates, narrow_tile
from .linear_finish import ACTIVATIONS, finish, finish_floats
from .numbers import capability
from .quantize_tokens import quantize_tokens
from .tiles import TileConfig, TileTable


@triton.jit(do_not_specialize=["m", "panel_stride"])
def block_sparse(
    A, SCALE, ZERO, VALUES, START, COLUMN, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT,
    m, n, block_rows, panel_stride, stride_residual,
    BLOCK_M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, J: tl.constexpr, INTEGERS: tl.constexpr,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block_row, first_row = pid % block_rows, pid // block_rows * BLOCK_M
    rows, columns = first_row + tl.arange(0, BLOCK_M), block_row * R + tl.arange(0, R)
    low, high = tl.load(START + block_row), tl.load(START + block_row + 1)
    acc = tl.zeros([BLOCK_M, R], tl.int32 if INTEGERS else tl.float32)
    for first in range(low, high, J):
        block = first + tl.arange(0, J)
        valid = block < high
        column = tl.load(COLUMN + block, mask=valid, other=0)
        a = load_panels(A, column, valid, first_row, panel_stride, BLOCK_M, C, J)
        at = block.to(tl.int64)[:, None] * (R * C) + tl.arange(0, R * C)[None, :]
        w = tl.load(VALUES + at, mask=valid[:, None], other=0).to(a.dtype)
        w = tl.reshape(tl.permute(tl.reshape(w, [J, R, C]), (1, 0, 2)), [R, J * C])
        if INTEGERS:
            acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(a, tl.trans(w), acc, input_precision="ieee")
    scale = tl.load(SCALE + rows, mask=rows < m, other=0.0)
    if INTEGERS:
        zero = tl.zeros([BLOCK_M], tl.int32)
        if HAS_ZERO:
            zero = tl.load(ZERO + rows, mask=rows < m, other=0)
        finish(
            acc, rows, columns, m, n, scale, zero, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, stride_residual,
            HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
        finish_floats(
            acc * scale[:, None], rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual,
            HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


def unsupported(pattern: str, values: torch.dtype) -> str | None:
    """Why this kernel cannot take a weight with such a pattern ("8x4", …) and values of this type, or None."""
    match = re.fullmatch(r"(\d+)x(\d+)", pattern)
    if match is None or int(match[1]) not in BLOCK_ROWS or int(match[2]) not in BLOCK_COLUMNS:
        return f"pattern {pattern}: blocks of {BLOCK_ROWS} outputs x {BLOCK_COLUMNS} inputs"
    if values not in (torch.int8, torch.float32, torch.float16, torch.bfloat16):
        return f"values of {values}: int8 or floats"
    return None


# `block_n` becomes R, `block_k` is J · C. By rule, not measured; chosen so that nothing spills.
TILES = TileTable(
    "block_sparse_linear",
    {str(m): TileConfig(m, 8, 64, 4, 3) for m in (16, 32, 64, 128)}
    | {f"{m}, float32": TileConfig(m, 8, 32, 4, 3) for m in (16, 32)},
)


def block_sparse_tile(capability: int, m: int, size: tuple[int, int], dtype: torch.dtype) -> TileConfig:
    """`dtype`: of the products. A step has at least one block."""
    if m <= FEW_TOKENS:
        return narrow_tile(capability, size)
    floats = dtype == torch.float32
    block_m = 16 if m <= 16 else 32 if m <= 32 or floats else 64 if m <= 512 or size[0] > 16 else 128
    tile = TILES.tile(capability, str(block_m) + (", float32" if floats else ""))
    return replace(tile, block_n=size[0], block_k=max(tile.block_k, size[1]))


def _candidates(stored: TileConfig, wide: TileConfig) -> list[TileConfig]:
    if stored.block_m == 1:
        return [*narrow_candidates(stored), wide]
    return autotune.neighbours(stored, block_k=(32, 64, 128), warps=(2, 4, 8), stages=(2, 3, 4))


def block_sparse_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    kept: BlockRows,
    out_features: int,
    size: tuple[int, int],
    weight_scale: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """`activation(x Wᵀ + bias) + residual` with a block-sparse W; checked arguments.

    The numbers are those of `int8_linear` (int8 values) or of `sparse_linear` (floats) for the dense weight.

    Args:
        x: [..., K], any float type, any strides.
        values: [blocks · R · C], int8 or float, as stored. kept: `block_panels.block_rows` of their places.
        out_features, size: N, (R, C).
        weight_scale: [N] float32, of int8 values. weight_sum: [N] int32, sums of the weights; asymmetric activations.
        act_bits, act_symmetric: of int8 values.
        tile: other than `autotune` chooses, which starts from `block_sparse_tile`.

    Returns:
        [..., N]; with int8 values `out_dtype=torch.int32` gives the exact sums.
    """
    k, n, whole = x.shape[-1], out_features, values.dtype == torch.int8
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.reshape(-1, k) if k else x.new_zeros((x.shape[:-1].numel(), 1))
    m, c = rows.shape[0], size[1]
    dtype = values.dtype if whole or values.dtype == x.dtype else torch.float32
    if tile is None:
        # how much is kept decides too, in steps of a power of two
        many = autotune.tokens(kept.column.numel())
        sizes = f"{autotune.tokens(m)}x{k}x{n} {size} {many} {x.dtype} {values.dtype} {act_symmetric} {activation}"
        arguments = (x, values, kept, n, size, weight_scale, weight_sum, bias, act_bits, act_symmetric, activation)
        stored = block_sparse_tile(capability(x), m, size, dtype)
        tile = autotune.choose(
            "block_sparse_linear", sizes, stored,
            lambda: _candidates(stored, block_sparse_tile(capability(x), FEW_TOKENS + 1, size, dtype)),
            lambda tile: block_sparse_linear(*arguments, out_dtype, residual, tile), x,
        )  # fmt: skip
    padded = triton.cdiv(m, tile.block_m) * tile.block_m
    if whole:
        a, scale, zero = quantize_tokens(rows, act_bits, act_symmetric, c, padded)
    else:
        a, scale = to_panels(rows, c, padded, dtype)
        zero = scale
    if residual is not None:
        residual = residual.reshape(m, n)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    block_rows = triton.cdiv(n, size[0])
    nowhere = scale
    pointers = (
        a, scale, zero, values, kept.start, kept.column, nowhere if weight_scale is None else weight_scale,
        nowhere if weight_sum is None else weight_sum, nowhere if bias is None else bias.contiguous(),
        nowhere if residual is None else residual, out,
    )  # fmt: skip
    sizes_of = (block_rows, padded * c, 0 if residual is None else residual.stride(0))
    options = {
        "R": size[0], "C": c, "J": tile.block_k // c, "HAS_ZERO": whole and not act_symmetric,
        "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": ACTIVATIONS.index(activation), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    grid = (block_rows * (padded // tile.block_m),)
    if tile.block_m == 1:
        kind = INT8.value if whole else FLOATS.value
        block_sparse_narrow[grid](*pointers, m, n, 1, 1, *sizes_of, KIND=kind, **options)
    else:
        block_sparse[grid](*pointers, m, n, *sizes_of, BLOCK_M=tile.block_m, INTEGERS=whole, **options)
    return out
