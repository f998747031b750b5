"""When pruning in a training changes its masks, and how much it prunes by then."""

from __future__ import annotations

import torch

from tcompress.packing.sparse_pattern import Pattern
from tcompress.prune.magnitude import all_but_smallest, by_element, largest_of_groups
from tcompress.recipe.training_prune import TrainingPrune


def cubic(done: float) -> float:
    """Which part of the final sparsity there is when so much of the pruning is done, both 0 … 1: 1 - (1 - t)³; Zhu and
    Gupta, "To prune, or not to prune", arXiv 1710.01878, section 3, equation 1, from a dense model on."""
    return 1 - (1 - min(max(done, 0.0), 1.0)) ** 3


def keep_largest(scores: torch.Tensor, pattern: Pattern, sparsity: float | None, part: float) -> torch.Tensor:
    """The mask of a pattern on its way, by scores of any sign.

    Args:
        scores: of the pattern's blocks, [ceil(N/R), ceil(K/C)]; of single weights, [N, K], if unstructured or N:M.
        sparsity: at the end; of N:M the pattern says it.
        part: which part of it is wanted now, 0 … 1. N:M goes over the whole numbers from M:M to N:M.

    Returns:
        bool, of the shape of the scores.
    """
    if pattern.kind == "n_m":
        n, m = pattern.size
        now = m - round((m - n) * part)
        if now == m:
            return torch.ones_like(scores, dtype=torch.bool)
        # What groups are padded with at a row's end is zero, and must come last.
        return largest_of_groups(scores - scores.min() + 1, (now, m))
    assert sparsity is not None
    return all_but_smallest(scores.flatten(), round(sparsity * part * scores.numel())).view(scores.shape)


def spread(blocks: torch.Tensor, pattern: Pattern, shape: torch.Size) -> torch.Tensor:
    """The mask [N, K] of `keep_largest`'s result."""
    return by_element(blocks, shape, pattern.size) if pattern.kind == "blocks" else blocks


def span(config: TrainingPrune, steps: int) -> tuple[int, int]:
    """t₀ and t₁: the first step with pruning and the last one that changes a mask."""
    last = max(round(config.end * steps) - 1, 0)
    return min(round(config.begin * steps), last), last


def prunes_now(config: TrainingPrune, step: int, steps: int) -> float | None:
    """How much of the pruning is done at this step, 0 … 1, where a mask is due to change; else None."""
    first, last = span(config, steps)
    if step == last:
        return 1.0
    due = first <= step < last and (step - first) % config.every == 0
    return (step - first) / (last - first) if due else None
