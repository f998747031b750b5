"""Storage layout "unstructured": the values that are not zero, row by row, and where they lie in the grid [N·K]."""

from __future__ import annotations

import torch

from tcompress.packing.sparse_index import decode_index, encode_index
from tcompress.packing.sparse_values import Stored, load_values, store_values


def pack_unstructured(dense: torch.Tensor, bits: int) -> Stored:
    """Packs a weight [N, K] of integers, or of the bits of floats."""
    mask = dense != 0
    return Stored(store_values(dense[mask], bits), *encode_index(mask.flatten()))


def unpack_unstructured(stored: Stored, shape: tuple[int, int], bits: int) -> torch.Tensor:
    """The inverse of `pack_unstructured`.

    Raises:
        ValueError: a malformed index, or values that do not fit it.
    """
    n, k = shape
    mask = decode_index(stored.index, stored.index_kind, n * k)
    values = load_values(stored.values, bits, int(mask.count_nonzero()))
    return values.new_zeros(n * k).masked_scatter_(mask, values).view(n, k)
