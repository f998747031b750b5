"""Magnitude pruning: the smallest weights go."""

from __future__ import annotations

import math

import torch

from tcompress.errors import message
from tcompress.packing.sparse_blocks import block_grid
from tcompress.packing.sparse_n_m import row_groups
from tcompress.packing.sparse_pattern import Pattern


def magnitude_mask(weight: torch.Tensor, pattern: str, sparsity: float | None = None) -> torch.Tensor:
    """Keeps the weights, or blocks of them, that are largest; Han et al., "Learning both Weights and Connections for
    Efficient Neural Networks", arXiv 1506.02626, section 3.

    ::

        unstructured, RxC   of B blocks the round(sparsity · B) with the smallest score go, rounding half to even;
                            score = sqrt(sum of w² / elements that the block has inside [N, K])
        N:M                 of each M elements of a row the N with the largest |w| stay; of L elements that are left at
                            the row's end ceil(N·L / M)

    Of equal ones the first in row-major order stay. Scores of blocks are computed in float64.

    Args:
        weight: [N, K], any float type.
        pattern: "unstructured", "2:4", "8x4" … (`Pattern`).
        sparsity: what part of the blocks goes, 0 … 1. N:M determines it: None or 1 - N/M.

    Returns:
        bool [N, K], True where the weight is kept.

    Raises:
        TypeError: the weight is not of a float type. ValueError: it is not two-dimensional, holds NaN or infinity, the
            pattern is unknown or the sparsity out of its range.
    """
    parsed = Pattern.parse(pattern)
    check(weight, parsed, sparsity, "magnitude_mask")
    if parsed.kind == "n_m":
        return largest_of_groups(weight.detach().abs(), parsed.size)
    assert sparsity is not None  # `check`
    scores = block_scores(weight.detach(), parsed.size)
    keep = all_but_smallest(scores.flatten(), round(sparsity * scores.numel())).view(scores.shape)
    return by_element(keep, weight.shape, parsed.size)


def by_element(blocks: torch.Tensor, shape: torch.Size, size: tuple[int, int]) -> torch.Tensor:
    """The mask [N, K] of one over its blocks [ceil(N/R), ceil(K/C)]."""
    (n, k), (r, c) = shape, size
    return blocks.repeat_interleave(r, 0)[:n].repeat_interleave(c, 1)[:, :k].contiguous()


def block_scores(weight: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Mean squares by block, [N, K] -> [ceil(N/R), ceil(K/C)]; of single elements their magnitude, which has the same
    order."""
    (n, k), (r, c) = weight.shape, size
    if size == (1, 1):
        return weight.abs()
    rows = block_grid(weight.new_ones(n, 1), (r, 1)).sum((2, 3), dtype=torch.float64)  # [ceil(N/R), 1]
    columns = block_grid(weight.new_ones(1, k), (1, c)).sum((2, 3), dtype=torch.float64)  # [1, ceil(K/C)]
    return block_grid(weight.double().square(), size).sum((2, 3)) / (rows * columns)


def all_but_smallest(scores: torch.Tensor, removed: int) -> torch.Tensor:
    """bool, False for the `removed` smallest of scores [B]. Selecting takes a tenth of the time of sorting."""
    if removed == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(removed).values
    keep = scores > threshold
    ties = (scores == threshold).nonzero()[:, 0]
    keep[ties[: scores.numel() - removed - int(keep.count_nonzero())]] = True
    return keep


def largest_of_groups(magnitude: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """N:M: bool, True for the N largest of each M elements of a row; of equal ones the first."""
    (rows, k), (n, m) = magnitude.shape, size
    groups = row_groups(magnitude, m)
    order = torch.sort(groups, dim=2, descending=True, stable=True).indices
    counts = torch.full((groups.shape[1], 1), n, device=magnitude.device)
    if k % m:
        counts[-1] = -(-n * (k % m) // m)
    chosen = (torch.arange(m, device=magnitude.device) < counts).expand(groups.shape)
    keep = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, order, chosen)
    return keep.view(rows, groups.shape[1] * m)[:, :k].contiguous()


def check(weight: torch.Tensor, pattern: Pattern, sparsity: float | None, where: str) -> None:
    """Raises what `magnitude_mask` raises, in the name of `where`."""
    if not weight.is_floating_point():
        raise TypeError(message(where, "weight", weight.dtype, "a float type"))
    if weight.dim() != 2:
        raise ValueError(message(where, "weight", list(weight.shape), "[N, K]"))
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        hint = "a NaN or infinite weight has no magnitude to compare; repair the checkpoint"
        raise ValueError(message(where, "weight", f"{bad} values NaN or infinite", "finite", hint))
    if pattern.kind == "n_m":
        n, m = pattern.size
        if sparsity is not None and not math.isclose(sparsity, 1 - n / m):
            raise ValueError(message(where, "sparsity", sparsity, f"None or {1 - n / m} for {pattern}"))
    elif sparsity is None or not 0 <= sparsity <= 1:
        raise ValueError(message(where, "sparsity", sparsity, f"0 to 1 for {pattern}"))
