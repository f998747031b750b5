"""Which patterns the zeros of a weight have."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tcompress.errors import message
from tcompress.packing.sparse_blocks import kept_blocks
from tcompress.packing.sparse_index import encode_index
from tcompress.packing.sparse_n_m import crowded_groups
from tcompress.packing.sparse_pattern import Pattern

CANDIDATES = ("unstructured", "2:4", "1x4", "8x4", "16x16", "32x32")


@dataclass(frozen=True)
class PatternFit:
    """What a weight [N, K] costs in a pattern.

    Attributes:
        pattern: as `Pattern` writes it.
        kept_fraction: of the blocks, those that must be kept, 0 … 1; of elements if unstructured, N/M if N:M.
        values: how many values are stored, with the padding of ragged blocks and of groups with fewer than N.
        density: values / (N·K); above 1 where padding outweighs what is dropped.
        index_bytes: what the index takes.
    """

    pattern: str
    kept_fraction: float
    values: int
    density: float
    index_bytes: int

    def nbytes(self, bits: int) -> int:
        """Bytes of values and index with values of so many bits; scales come on top."""
        return -(-self.values * bits // 8) + self.index_bytes


def find_patterns(weight: torch.Tensor) -> list[PatternFit]:
    """What each pattern would store of a weight, without packing it.

    Unstructured and the blocks 1x4, 8x4, 16x16 and 32x32 fit any weight, at a density that tells whether they pay; 2:4
    is listed only if it holds everywhere. -0.0 counts as zero, NaN does not.

    Args:
        weight: [N, K], floats or integers.

    Raises:
        ValueError: not two-dimensional.
    """
    if weight.dim() != 2:
        raise ValueError(message("find_patterns", "weight", list(weight.shape), "[N, K]"))
    nonzero = weight != 0
    fits = [_fit(nonzero, Pattern.parse(text)) for text in CANDIDATES]
    return [fit for fit in fits if fit is not None]


def _fit(nonzero: torch.Tensor, pattern: Pattern) -> PatternFit | None:
    (rows, k), (first, second) = nonzero.shape, pattern.size
    if pattern.kind == "n_m":
        if crowded_groups(nonzero, pattern.size):
            return None
        values = rows * -(-k // second) * first
        kept_fraction = first / second
        index_bytes = -(-values * (second - 1).bit_length() // 8)
    else:
        mask = kept_blocks(nonzero, pattern.size)
        blocks = int(mask.count_nonzero())
        values = blocks * first * second
        kept_fraction = blocks / max(mask.numel(), 1)
        index_bytes = encode_index(mask.flatten())[0].numel()
    return PatternFit(str(pattern), kept_fraction, values, values / max(nonzero.numel(), 1), index_bytes)
