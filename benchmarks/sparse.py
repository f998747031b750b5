"""The sparse linear layers that are compared: random weights of which the smallest are zero."""

from __future__ import annotations

import torch
from linear import Linear
from shapes import LinearShape, SparseShape

from tcompress.prune import magnitude_mask


class SparseLinear(Linear):
    """`x wᵀ + b` with a pruned w; the error is against the pruned one, so pruning itself adds nothing to it."""

    def inputs(self, shape: LinearShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x, w, b = super().inputs(shape)
        assert isinstance(shape, SparseShape)
        return x, prune(w, shape.pattern, shape.sparsity), b


def prune(w: torch.Tensor, pattern: str, sparsity: float) -> torch.Tensor:
    """w [N, K] with zeros by magnitude. `sparsity` is a part of the blocks; 2:4 has its own."""
    return w * magnitude_mask(w, pattern, None if ":" in pattern else sparsity)


def kept_blocks(w: torch.Tensor, r: int, c: int) -> float:
    """The part of the blocks of r outputs by c inputs, which divide w, that hold a non-zero weight."""
    n, k = w.shape
    return float((w != 0).view(n // r, r, k // c, c).any(3).any(1).float().mean())


def in_blocks(w: torch.Tensor, r: int, c: int) -> bool:
    """Whether whole blocks are zero, and little else."""
    return kept_blocks(w, r, c) < 1.2 * kept_blocks(w, 1, 1)
