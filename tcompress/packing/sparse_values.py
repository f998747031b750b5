"""What is kept of a sparse weight: its values and where they lie."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tcompress.errors import message
from tcompress.packing.int4 import join_nibbles, unpack_int4

#: What stands for 0 where 4-bit integers are stored.
ZERO = 8


@dataclass(frozen=True)
class Stored:
    """The kept part of a weight as a storage layout gives it: fields of `SparseWeight`, of floats the bits."""

    values: torch.Tensor
    index: torch.Tensor
    index_kind: str


def float_bits(floats: torch.Tensor) -> torch.Tensor:
    """Floats of 4 or 2 bytes as integers, to be moved: some of torch's copies rewrite a NaN (scatter of bfloat16)."""
    return floats.view(torch.int32 if floats.element_size() == 4 else torch.int16)


def store_values(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Values in the order of the layout, 1-D, as they are saved: of 4 bits (int8 -8 … 7) two a byte, 8 added."""
    if bits != 4:
        return values
    return join_nibbles((values + ZERO).to(torch.uint8)[None])[0]


def load_values(stored: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The inverse of `store_values`, of `count` values.

    Raises:
        ValueError: there are more or fewer.
    """
    expected = -(-count // 2) if bits == 4 else count
    if stored.numel() != expected:
        hint = "values and index belong to different weights, or a file is damaged"
        raise ValueError(message("SparseWeight", "values", stored.numel(), f"{expected} by the index", hint))
    return unpack_int4(stored[None], count)[0].to(torch.int8) - ZERO if bits == 4 else stored
