"""Storage layout of a weight whose elements are indices into small tables of values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tcompress.errors import message

#: How many rows are packed at once, so that their single bits stay small.
_ROWS = 1024


def pack_bits(q: torch.Tensor, bits: int) -> torch.Tensor:
    """Packs integers 0 … 2^bits - 1, [N, K], to uint8 [N, ceil(K·bits/8)]: one after the other along a row, each from
    its lowest bit on, into bytes from their lowest bit on. Of 4 bits this is `pack_int4`.

    Raises:
        TypeError: not uint8. ValueError: not two-dimensional, bits not 1 to 8, or a value that does not fit.
    """
    if q.dtype != torch.uint8:
        raise TypeError(message("pack_bits", "q", q.dtype, "uint8"))
    if not 1 <= bits <= 8:
        raise ValueError(message("pack_bits", "bits", bits, "1 to 8"))
    if q.dim() != 2:
        raise ValueError(message("pack_bits", "q", list(q.shape), "[N, K]"))
    if q.numel() and int(q.max()) >> bits:
        raise ValueError(message("pack_bits", "q", f"a value of {int(q.max())}", f"0 to {2**bits - 1}"))
    shifts = torch.arange(bits, dtype=torch.uint8, device=q.device)
    places = torch.arange(8, dtype=torch.uint8, device=q.device)
    parts = []
    for rows in q.split(_ROWS):
        single = ((rows[:, :, None] >> shifts) & 1).flatten(1)
        single = F.pad(single, (0, -single.shape[1] % 8)).unflatten(1, (-1, 8))
        parts.append((single << places).sum(2, dtype=torch.uint8))
    return torch.cat(parts) if parts else q.new_zeros(0, packed_width(q.shape[1], bits))


def packed_width(k: int, bits: int) -> int:
    """Bytes of a row of K integers."""
    return -(-k * bits // 8)


def unpack_bits(packed: torch.Tensor, k: int, bits: int) -> torch.Tensor:
    """The inverse of `pack_bits`: uint8 [N, K]."""
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], -1).flatten(1)[:, :k]
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    shifts = torch.arange(bits, dtype=torch.uint8, device=packed.device)
    single = ((packed[:, :, None] >> places) & 1).flatten(1)[:, : k * bits].unflatten(1, (k, bits))
    return (single << shifts).sum(2, dtype=torch.uint8)


@dataclass(frozen=True)
class CodebookWeight:
    """A weight as indices into codebooks, one codebook for each tile of `rows` x `columns` elements.

    `W[n, k] = codebook[n // rows, k // columns, index[n, k]]`

    Attributes:
        indices: uint8 [N, ceil(K·bits/8)] (`pack_bits`).
        codebook: float16 or float32 [ceil(N/rows), ceil(K/columns), 2^bits].
        shape: (N, K) of the weight.
        bits: 1 … 8.
        rows, columns: of a tile; N or more, and K or more, for one tile along that side.
    """

    indices: torch.Tensor
    codebook: torch.Tensor
    shape: tuple[int, int]
    bits: int
    rows: int
    columns: int

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight [N, K], in the codebook's type unless another is asked for."""
        n, k = self.shape
        values = self.codebook if dtype is None else self.codebook.to(dtype)
        index = unpack_bits(self.indices, k, self.bits).long()
        # Which codebook, in the flat table: a row's and a column's share of the position.
        across = math.ceil(k / self.columns)
        row = torch.arange(n, device=index.device) // self.rows * across
        column = torch.arange(k, device=index.device) // self.columns
        index += (row[:, None] + column) << self.bits
        return values.flatten()[index]

    @property
    def nbytes(self) -> int:
        return self.indices.nbytes + self.codebook.nbytes


def codebook_shape(shape: tuple[int, int], bits: int, rows: int, columns: int) -> tuple[int, int, int]:
    """Of the codebooks of a weight [N, K]."""
    return math.ceil(shape[0] / rows), math.ceil(shape[1] / columns), 2**bits
