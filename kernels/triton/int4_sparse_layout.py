"""How the GPU's kernels hold a 4-bit weight with blocks of zeros: one tensor of bytes, parts at multiples of 64.

    gpu-RxC  blocks of R outputs x C inputs that are not all zero, row by row; B of them. Groups of g inputs, of which
             a block lies in one; W = ceil(K/g)
        start  [ceil(N/R) · W + 1] int32    the first block of each row of blocks and group
        scale  [N][W] float16 or float32
        value  [B][R · C / 2]               o0: k0|k1 k2|k3 … o1: …   the even k in the low nibble, 8 added
        column [B] int32                    where along K a block lies, in blocks

Plain torch; nothing but `pack` waits for a GPU.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .sparse_layout import PREFIX, as_bytes, block_size, padded_bytes, to_multiple

PATTERNS = ("8x4", "16x16")
#: The pattern by layout.
LAYOUTS = {PREFIX + pattern: pattern for pattern in PATTERNS}
ZERO = 8


class Parts(NamedTuple):
    """Views of a packed weight."""

    start: torch.Tensor
    scale: torch.Tensor
    values: torch.Tensor
    column: torch.Tensor


@lru_cache(maxsize=4096)  # a layer asks at each call
def _head(n: int, k: int, group_size: int, scale_dtype: torch.dtype, pattern: str) -> tuple[int, int, int, int]:
    """Entries of start; bytes from which the scales and the values come; groups."""
    groups = -(-k // group_size)
    entries = -(-n // block_size(pattern)[0]) * groups + 1
    scales = to_multiple(4 * entries)
    return entries, scales, scales + to_multiple(n * groups * scale_dtype.itemsize), groups


def least_bytes(n: int, k: int, group_size: int, scale_dtype: torch.dtype, pattern: str) -> int:
    """Of a weight without blocks."""
    return _head(n, k, group_size, scale_dtype, pattern)[2]


def block_bytes(pattern: str) -> int:
    """Of one more block."""
    r, c = block_size(pattern)
    return r * c // 2 + 4


def parts(packed: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, pattern: str) -> Parts:
    """Views; looks at the size alone."""
    entries, scales, values, groups = _head(n, k, group_size, scale_dtype, pattern)
    columns = packed.numel() - 4 * ((packed.numel() - values) // block_bytes(pattern))
    return Parts(
        packed[: 4 * entries].view(torch.int32),
        packed[scales : scales + n * groups * scale_dtype.itemsize].view(scale_dtype).view(n, groups),
        packed[values:columns].view(torch.uint8),
        packed[columns:].view(torch.int32),
    )


def pack(weight: torch.Tensor, scale: torch.Tensor, group_size: int, pattern: str) -> torch.Tensor:
    """Integers -8 … 7 [N, K] int8 and scales [N, W] to the layout."""
    (n, k), (r, c) = weight.shape, block_size(pattern)
    padded = F.pad(weight, (0, -k % c, 0, -n % r))
    rows, columns = padded.shape[0] // r, padded.shape[1] // c
    grid = padded.view(rows, r, columns, c).transpose(1, 2)
    kept = (grid != 0).flatten(2).any(2)
    a_group = group_size // c if group_size < k else max(columns, 1)
    counts = F.pad(kept, (0, -columns % a_group)).view(rows, -(-columns // a_group), a_group).sum(2)
    start = F.pad(counts.flatten().cumsum(0), (1, 0)).to(torch.int32)
    nibbles = (grid[kept] + ZERO).to(torch.uint8).view(-1, 2)
    column = kept.nonzero()[:, 1].to(torch.int32)
    values = [as_bytes(nibbles[:, 0] | nibbles[:, 1] << 4), as_bytes(column)]
    return torch.cat([padded_bytes(start), padded_bytes(scale), *values])


def unpack(
    packed: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, pattern: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `pack`: the weight [N, K] int8, and its scales [N, W]."""
    found, (r, c) = parts(packed, n, k, group_size, scale_dtype, pattern), block_size(pattern)
    rows, columns, groups = -(-n // r), -(-k // c), -(-k // group_size)
    place = torch.arange(found.column.numel(), dtype=torch.int32, device=packed.device)
    row = torch.searchsorted(found.start[1:], place, right=True) // max(groups, 1)
    blocks = torch.stack([found.values & 15, found.values >> 4], 1).to(torch.int8).view(-1, r, c) - ZERO
    grid = blocks.new_zeros(rows * columns, r, c)
    grid[row * columns + found.column] = blocks
    dense = grid.view(rows, columns, r, c).transpose(1, 2).reshape(rows * r, columns * c)
    return dense[:n, :k].contiguous(), found.scale.clone()
