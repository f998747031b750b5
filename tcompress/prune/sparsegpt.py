"""SparseGPT: pruning in which the weights that stay make up for those that go, and rounding in the same pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tcompress.packing import PackedWeight
from tcompress.packing.sparse_pattern import Pattern
from tcompress.prune.magnitude import all_but_smallest, block_scores, by_element, check, largest_of_groups
from tcompress.quantize.column_update import BLOCK, fix_columns, inverse_factor
from tcompress.quantize.gptq import gptq
from tcompress.quantize.scheme import QuantArgs
from tcompress.statistics import InputStatistics, checked_hessian


@dataclass(frozen=True)
class SparseSolution:
    """A pruned weight.

    Attributes:
        mask: bool [N, K], True where a weight is kept; one that is kept may still have been rounded to zero.
        weight: float32 [N, K], zero where the mask is False.
        packed: the same weight's integers where it was rounded too, or None.
    """

    mask: torch.Tensor
    weight: torch.Tensor
    packed: PackedWeight | None = None


def sparsegpt(
    weight: torch.Tensor,
    statistics: InputStatistics,
    pattern: str,
    sparsity: float | None = None,
    args: QuantArgs | None = None,
    *,
    damping: float = 0.01,
) -> SparseSolution:
    """Prunes a weight so that its outputs on the calibration data change little: min ‖(W - Ŵ) X‖²; Frantar and
    Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774, section 3.

    ::

        H⁻¹ = Uᵀ U                        of H + λI, λ = damping · mean(diag H): `inverse_factor`
        score of a weight                 w_ij² / U_jj², twice what removing it costs, from the current values
        for each 128 columns:             the round(sparsity · weights) with the smallest scores go (section 3.3)
        N:M, at each M columns:           all but the N with the largest scores go (section 3.4)
        RxC, for each 128 columns:        the blocks with the smallest mean score go. The paper has no blocks; the score
                                          leaves out what the removals of one block mean to each other.
        for each column i:                q = w_i where it is kept, else 0; e = (w_i - q) / U_ii; w_j -= e U_ij, j > i

    With `args`, q is w_i rounded to the grid that `round_to_nearest` has for the whole weight, so that later columns
    make up for the rounding as well (section 3.5). Columns are taken from the left to the right. The weights of an
    input that is always zero go first. If no damping makes H positive definite, scores are magnitudes and nothing makes
    up for errors, with a warning.

    Args:
        weight: [N, K], any float type; computed in float32.
        statistics: of the layer's inputs, with a Hessian.
        pattern, sparsity: as in `magnitude_mask`.
        args: of a `Scheme`'s weights, or None to prune only.
        damping: relative to the mean of H's diagonal.

    Raises:
        TypeError, ValueError: as `magnitude_mask`; ValueError too for statistics without a Hessian, without inputs or
            of another K, and a weight too large for float16 scales.
    """
    parsed = Pattern.parse(pattern)
    check(weight, parsed, sparsity, "sparsegpt")
    w = weight.detach().float().clone()
    hessian = checked_hessian(statistics, w.shape[1], "sparsegpt").to(w.device)
    dead = hessian.diagonal() == 0
    w[:, dead] = 0
    mask = torch.ones_like(w, dtype=torch.bool)
    if bool(dead.any()):
        hessian = hessian + torch.diag(dead.float())
    factor = inverse_factor(hessian, damping, "sparsegpt")
    diagonal = factor.diagonal()

    def keep(values: torch.Tensor, first: int) -> torch.Tensor:
        columns = slice(first, first + values.shape[1])
        root = values.abs() / diagonal[columns]
        if parsed.kind == "n_m":
            kept = largest_of_groups(root, parsed.size)
        else:
            assert sparsity is not None  # `check`
            scores = block_scores(root, parsed.size)
            kept = all_but_smallest(scores.flatten(), round(sparsity * scores.numel())).view(scores.shape)
            kept = by_element(kept, root.shape, parsed.size)
        mask[:, columns] = kept
        return kept

    width = parsed.size[1]
    block = width * (BLOCK // width)
    span = width if parsed.kind == "n_m" else block
    values, _ = fix_columns(w, factor, None, keep, block, span)
    if args is None:
        return SparseSolution(mask, values)
    packed = gptq(values, statistics, args, damping=damping)
    return SparseSolution(mask, packed.dequantize(), packed)
