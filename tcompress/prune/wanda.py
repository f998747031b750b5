"""Wanda: the weights go whose products with their inputs are smallest."""

from __future__ import annotations

import torch

from tcompress.packing.sparse_pattern import Pattern
from tcompress.prune.magnitude import block_scores, by_element, check, largest_of_groups
from tcompress.statistics import InputStatistics, check_count


def wanda_mask(
    weight: torch.Tensor, statistics: InputStatistics, pattern: str, sparsity: float | None = None
) -> torch.Tensor:
    """Keeps the weights with the largest |W_ij| · ‖X_j‖₂, compared within one output; Sun et al., "A Simple and
    Effective Pruning Approach for Large Language Models", arXiv 2306.11695, section 3.

    ::

        unstructured   of each row's K weights the round(sparsity · K) with the smallest score go
        N:M            of each M scores of a row the N largest stay (section 3, "Structured N:M sparsity")
        RxC            score of a block = root mean square of its elements' scores; of each R outputs' B blocks the
                       round(sparsity · B) smallest go. The paper has no blocks; this is its comparison within an
                       output, for the R outputs that go together.

    Nothing is updated. Of equal ones the first stay.

    Args:
        weight: [N, K], any float type.
        statistics: of the layer's inputs; the Hessian is not needed.
        pattern, sparsity: as in `magnitude_mask`.

    Returns:
        bool [N, K], True where the weight is kept.

    Raises:
        TypeError, ValueError: as `magnitude_mask`; ValueError too for statistics without inputs or of another K.
    """
    parsed = Pattern.parse(pattern)
    check(weight, parsed, sparsity, "wanda_mask")
    check_count(statistics, weight.shape[1], "wanda_mask")
    products = weight.detach().float().abs() * statistics.norm.to(weight.device)
    if parsed.kind == "n_m":
        return largest_of_groups(products, parsed.size)
    assert sparsity is not None  # `check`
    scores = block_scores(products, parsed.size)
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    removed = round(sparsity * scores.shape[1])
    keep = torch.zeros_like(scores, dtype=torch.bool)
    keep.scatter_(1, order[:, : scores.shape[1] - removed], True)
    return by_element(keep, weight.shape, parsed.size)
