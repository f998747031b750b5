"""How much of each layer goes, so that a given part of all of them does."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tcompress.errors import message


def by_ranking(scores: Sequence[torch.Tensor], sparsity: float, most: float = 1.0) -> list[float]:
    """Ranks the elements or blocks of all layers together; the lowest go. Han et al., arXiv 1506.02626, section 3, with
    one threshold for the model.

    A layer that would lose more than `most` of its blocks loses that much, and the others make up for it.

    Args:
        scores: float [B], of the blocks of each layer, all of one size.
        sparsity: the part of all blocks that goes, 0 … 1.

    Returns:
        The sparsity of each layer: how many of its blocks go, over their number.

    Raises:
        ValueError: `most` does not allow the sparsity, or a score is NaN.
    """
    where = "by_ranking"
    if not 0 <= sparsity <= most:
        raise ValueError(message(where, "sparsity", sparsity, f"0 to {most}, the most that a layer may lose"))
    if any(bool(torch.isnan(s).any()) for s in scores):
        raise ValueError(message(where, "scores", "NaN", "numbers"))
    counts = [s.numel() for s in scores]
    limits = [math.floor(most * n + 1e-9) for n in counts]
    gone: dict[int, int] = {}
    free = list(range(len(scores)))
    while free:
        wanted = round(sparsity * sum(counts)) - sum(gone.values())
        found = dict(zip(free, _lowest([scores[i] for i in free], wanted), strict=True))
        over = [i for i in free if found[i] > limits[i]]
        gone |= {i: limits[i] for i in over} if over else found
        free = [i for i in free if i not in gone]
    return [gone[i] / counts[i] if counts[i] else 0.0 for i in range(len(scores))]


def _lowest(scores: Sequence[torch.Tensor], number: int) -> list[int]:
    """How many of each are among the lowest of all; of equal ones the first."""
    number = min(number, sum(s.numel() for s in scores))
    if number <= 0:
        return [0] * len(scores)
    threshold = torch.cat([s.flatten() for s in scores]).kthvalue(number).values
    below = [int((s < threshold).sum()) for s in scores]
    left = number - sum(below)
    for i, s in enumerate(scores):
        ties = min(int((s == threshold).sum()), left)
        below[i] += ties
        left -= ties
    return below


def by_sensitivity(
    errors: Sequence[Sequence[float]], ratios: Sequence[float], sizes: Sequence[int], sparsity: float
) -> list[float]:
    """Raises the sparsity of one layer after the other, where it costs least a weight, until enough is gone.

    Of each layer the next step may be to any higher ratio: the greedy way along the lower hull of its errors, which is
    the best there is for errors that add up, but for the last step, which goes only as far as is needed.

    Args:
        errors: [L][R], what layer l costs at ratio r.
        ratios: ascending, the first 0.
        sizes: weights of each layer.
        sparsity: the part of all weights that goes.

    Returns:
        The sparsity of each layer.

    Raises:
        ValueError: the ratios are not ascending from 0, or their last is too small for the sparsity.
    """
    where = "by_sensitivity"
    if list(ratios) != sorted(set(ratios)) or not ratios or ratios[0] != 0 or ratios[-1] > 1:
        raise ValueError(message(where, "ratios", list(ratios), "ascending ones from 0 to at most 1"))
    if not 0 <= sparsity <= ratios[-1]:
        raise ValueError(message(where, "sparsity", sparsity, f"0 to {ratios[-1]}, the last of the ratios"))
    level = [0] * len(sizes)
    left = sparsity * sum(sizes)
    found = [0.0] * len(sizes)
    while left > 0.5:
        best: tuple[float, int, int] | None = None
        for i, size in enumerate(sizes):
            for j in range(level[i] + 1, len(ratios)):
                gain = (ratios[j] - ratios[level[i]]) * size
                slope = (errors[i][j] - errors[i][level[i]]) / gain if gain else math.inf
                if best is None or slope < best[0]:
                    best = slope, i, j
        if best is None:
            break
        _, i, j = best
        step = (ratios[j] - found[i]) * sizes[i]
        found[i] = ratios[j] if step <= left else found[i] + left / sizes[i]
        level[i], left = j, left - min(step, left)
    return found
