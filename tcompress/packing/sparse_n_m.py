"""Storage layout "N:M": N values of each M consecutive elements of a row, and their positions in these M.

::

    values  [rows][ceil(K/M)][N]   by ascending position; a group with fewer is filled up with its first zeros
    index   the positions 0 … M-1 in the same order, ceil(log2 M) bits each, one after the other, the lowest bit of a
            number and of a byte first. 2:4 takes 2 bits: half a byte a group.

What lies beyond K in the last group counts as zeros. Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv
2104.08378, section 3, stores 2:4 the same way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress.errors import message
from tcompress.packing.sparse_index import check_index, pack_bits, unpack_bits
from tcompress.packing.sparse_values import Stored, load_values, store_values


def row_groups(dense: torch.Tensor, m: int) -> torch.Tensor:
    """[rows, K] -> [rows, ceil(K/M), M], padded with zeros."""
    rows, k = dense.shape
    return F.pad(dense, (0, -k % m)).view(rows, -(-k // m), m)


def crowded_groups(dense: torch.Tensor, size: tuple[int, int]) -> int:
    """How many groups hold more than N elements that are not zero: 0 if the weight has the pattern (N, M)."""
    n, m = size
    return int((row_groups(dense != 0, m).sum(2, dtype=torch.uint8) > n).sum())


def pack_n_m(dense: torch.Tensor, size: tuple[int, int], bits: int) -> Stored:
    """Packs a weight [rows, K] that has the pattern (N, M) of integers, or of the bits of floats.

    Raises:
        ValueError: the weight does not have the pattern.
    """
    n, m = size
    crowded = crowded_groups(dense, size)
    if crowded:
        hint = "prune with this pattern first"
        got = f"{crowded} groups of {m} with more than {n} values that are not zero"
        raise ValueError(message("pack_sparse", "dense", got, f"a {n}:{m} weight", hint))
    groups = row_groups(dense, m)
    mask = groups != 0
    spare = n - mask.sum(2, keepdim=True, dtype=torch.uint8)
    mask |= torch.cumsum(~mask, 2, dtype=torch.uint8) <= spare
    positions = torch.arange(m, dtype=torch.uint8, device=dense.device).expand(mask.shape)[mask]
    shifts = torch.arange(_position_bits(m), dtype=torch.uint8, device=dense.device)
    index = pack_bits(((positions[:, None] >> shifts) & 1).flatten().view(torch.bool))
    return Stored(store_values(groups[mask], bits), index, "positions")


def unpack_n_m(stored: Stored, shape: tuple[int, int], size: tuple[int, int], bits: int) -> torch.Tensor:
    """The inverse of `pack_n_m`.

    Raises:
        TypeError: the index is not uint8. ValueError: a malformed index, or values that do not fit it.
    """
    (rows, k), (n, m) = shape, size
    groups = -(-k // m)
    width = _position_bits(m)
    check_index(stored.index)
    flags = unpack_bits(stored.index, rows * groups * n * width).view(torch.uint8).view(-1, width)
    shifts = torch.arange(width, dtype=torch.uint8, device=flags.device)
    positions = (flags << shifts).sum(1, dtype=torch.uint8).view(rows, groups, n)
    if (positions >= m).any() or (positions[..., 1:] <= positions[..., :-1]).any():
        expected = f"{n} ascending positions below {m} a group"
        raise ValueError(message("SparseWeight", "index", "others", expected, "the file is damaged"))
    values = load_values(stored.values, bits, positions.numel()).view(positions.shape)
    grid = values.new_zeros(rows, groups, m).scatter_(2, positions.long(), values)
    return grid.view(rows, groups * m)[:, :k].contiguous()


def _position_bits(m: int) -> int:
    return (m - 1).bit_length()
