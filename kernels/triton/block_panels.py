"""What the kernels of block-sparse weights share: which blocks a row of blocks keeps, and activations in panels.

    weight: blocks of R outputs x C inputs that are not all zero, row by row (tcompress/packing/sparse_blocks.py)
        values [blocks][R][C]        as stored
        start  [rows + 1] int32      the first block of each row of blocks; with groups, of each row and group
        column [blocks] int32        where along K it lies, in blocks

    activations, panels of C columns: [Kp/C][Mp][C]
        panel 0: token 0: k0 … k(C-1) | token 1: k0 … | …        what a block needs of a tile of tokens lies together

Panels of floats are written by float_panels, of integers by quantize_tokens. Rows from M to Mp, a multiple of the tile,
are not written: what a kernel makes of them it does not store.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .numbers import all_finite

#: Columns of a block that divide a panel of quantize_tokens' padding.
BLOCK_COLUMNS = (4, 8, 16)
BLOCK_ROWS = (8, 16, 32, 64)


class BlockRows(NamedTuple):
    """Where the kept blocks lie, as the kernels read it; see the head of this file."""

    start: torch.Tensor
    column: torch.Tensor


def block_rows(mask: torch.Tensor, columns_a_group: int | None = None) -> BlockRows:
    """From which blocks are kept, bool [rows, columns]; no host synchronisation but that of `nonzero`.

    `columns_a_group`: for weights with a scale a group, how many columns of blocks share one; `start` then has
    ceil(columns / columns_a_group) entries a row.
    """
    rows, columns = mask.shape
    size = columns_a_group or max(columns, 1)
    groups = max(-(-columns // size), 1)
    padded = torch.nn.functional.pad(mask, (0, groups * size - columns))
    counts = padded.view(rows, groups, size).sum(2).flatten()
    start = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return BlockRows(start, mask.nonzero()[:, 1].to(torch.int32))


@triton.jit
def load_panels(A, column, valid, first_row, panel_stride, BLOCK_M: tl.constexpr, C: tl.constexpr, J: tl.constexpr):
    """Activations of BLOCK_M tokens for J blocks, [BLOCK_M, J · C]; 0 where not `valid`."""
    at = column.to(tl.int64)[:, None] * panel_stride + (first_row * C + tl.arange(0, BLOCK_M * C))[None, :]
    a = tl.load(A + at, mask=valid[:, None], other=0)
    return tl.reshape(tl.permute(tl.reshape(a, [J, BLOCK_M, C]), (1, 0, 2)), [BLOCK_M, J * C])


@triton.jit(do_not_specialize=["m", "panel_stride"])
def float_panels(
    X, PANELS, WHOLE, m, k, k_padded, stride_m, stride_k, panel_stride,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    """Also whether a row is finite, as float32: 1, or NaN."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = rows.to(tl.int64)[:, None]
    ok = tl.full([ROWS], 1, tl.int1)
    for start in range(0, k_padded, BLOCK_K):
        at = (start + tl.arange(0, BLOCK_K))[None, :]
        inside = (rows < m)[:, None] & (at < k)
        x = tl.load(X + row * stride_m + at.to(tl.int64) * stride_k, mask=inside, other=0.0)
        ok = ok & all_finite(x.to(tl.float32), 1)
        place = (at // PANEL).to(tl.int64) * panel_stride + row * PANEL + at % PANEL
        tl.store(PANELS + place, x.to(PANELS.dtype.element_ty), mask=(rows < m)[:, None] & (at < k_padded))
    tl.store(WHOLE + rows, tl.where(ok, 1.0, float("nan")), mask=rows < m)


def to_panels(x: torch.Tensor, panel: int, rows_padded: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K], floats, M > 0 -> panels [ceil(K/C), rows_padded, C] of `dtype`, and 1 or NaN [M] float32."""
    m, k = x.shape
    panels = triton.cdiv(max(k, 1), panel)
    out = torch.empty((panels, rows_padded, panel), dtype=dtype, device=x.device)
    whole = torch.empty(m, dtype=torch.float32, device=x.device)
    rows, block = 16, 128
    float_panels[(triton.cdiv(m, rows),)](
        x, out, whole, m, k, panels * panel, *x.stride(), rows_padded * panel,
        ROWS=rows, BLOCK_K=block, PANEL=panel, num_warps=4,
    )  # fmt: skip
    return out, whole
