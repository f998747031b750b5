"""Storage layout "RxC": the blocks of R outputs x C inputs that are not zero, and where they lie in the grid of blocks.

Blocks go row by row through the grid [ceil(N/R)][ceil(K/C)], elements row by row through a block::

    values  [blocks kept][R][C]      what lies beyond N or K is zero
    index   of the flattened grid    `encode_index`
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress.packing.sparse_index import decode_index, encode_index
from tcompress.packing.sparse_values import Stored, load_values, store_values


def block_grid(dense: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[N, K] -> its blocks [ceil(N/R), ceil(K/C), R, C], padded with zeros."""
    (n, k), (r, c) = dense.shape, size
    padded = F.pad(dense, (0, -k % c, 0, -n % r))
    return padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c).transpose(1, 2)


def kept_blocks(dense: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Which blocks hold anything but zeros: bool [ceil(N/R), ceil(K/C)]."""
    return block_grid(dense != 0, size).any(3).any(2)


def pack_blocks(dense: torch.Tensor, size: tuple[int, int], bits: int) -> Stored:
    """Packs a weight [N, K] in blocks of size (R, C) of integers, or of the bits of floats."""
    mask = kept_blocks(dense, size)
    blocks = block_grid(dense, size)[mask]
    return Stored(store_values(blocks.flatten(), bits), *encode_index(mask.flatten()))


def unpack_blocks(stored: Stored, shape: tuple[int, int], size: tuple[int, int], bits: int) -> torch.Tensor:
    """The inverse of `pack_blocks`.

    Raises:
        ValueError: a malformed index, or values that do not fit it.
    """
    (n, k), (r, c) = shape, size
    rows, columns = -(-n // r), -(-k // c)
    mask = decode_index(stored.index, stored.index_kind, rows * columns)
    blocks = load_values(stored.values, bits, int(mask.count_nonzero()) * r * c).view(-1, r, c)
    grid = blocks.new_zeros(rows * columns, r, c)
    grid[mask] = blocks
    return grid.view(rows, columns, r, c).transpose(1, 2).reshape(rows * r, columns * c)[:n, :k].contiguous()
