"""GPTQ: rounding in which later columns make up for the errors of earlier ones."""

from __future__ import annotations

import torch

from tcompress.packing import PackedWeight
from tcompress.quantize.column_update import BLOCK, fix_columns, inverse_factor
from tcompress.quantize.grid import Grid, checked
from tcompress.quantize.scheme import QuantArgs
from tcompress.statistics import InputStatistics, checked_hessian


def gptq(
    weight: torch.Tensor,
    statistics: InputStatistics,
    args: QuantArgs,
    *,
    keep_zeros: bool = True,
    act_order: bool = True,
    damping: float = 0.01,
) -> PackedWeight:
    """Quantizes a weight so that its outputs on the calibration data change little: min ‖(W - Ŵ) X‖²; Frantar et al.,
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323, section 3.3,
    algorithm 1.

    ::

        H⁻¹ = Uᵀ U                     of H + λI, λ = damping · mean(diag H): `inverse_factor`
        for each column i:             q_i = nearest on the grid;  e = (w_i - q_i) / U_ii;  w_j -= e U_ij for j > i

    The grid is that of `round_to_nearest` on the whole weight, found before anything moves ("static groups"): columns
    that share a scale stay neighbours whatever the order of the solution, and nothing is permuted at run time. An input
    that is always zero gives no reason to prefer a value: its column is rounded to nearest (the authors' code sets it
    to zero). If no damping makes H positive definite, the whole weight is, with a warning.

    Args:
        weight: [N, K], any float type; computed in float32.
        statistics: of the layer's inputs, with a Hessian.
        args: of a `Scheme`'s weights.
        keep_zeros: what is zero stays zero, so that a pruned weight keeps its pattern.
        act_order: columns in the order of descending diag H, so that the largest inputs are rounded while most others
            can still make up for it; else from the left to the right.
        damping: relative to the mean of H's diagonal.

    Raises:
        ValueError: a weight that is not [N, K] or not finite, statistics without a Hessian, without inputs, or of
            another K, or a weight too large for float16 scales.
    """
    w = checked(weight, "gptq")
    hessian = checked_hessian(statistics, w.shape[1], "gptq").to(w.device)
    grid = Grid.of(w, args, "gptq")
    diagonal = hessian.diagonal()
    hessian = hessian + torch.diag((diagonal == 0).float())  # dead columns: on their own, at the end
    order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(w.shape[1], device=w.device)
    factor = inverse_factor(hessian[order][:, order], damping, "gptq")
    places = order.tolist()
    columns = w[:, order]
    kept = columns != 0
    _, integers = fix_columns(
        columns,
        factor,
        lambda values, k: grid.column(values, places[k]),
        (lambda values, first: kept[:, first : first + values.shape[1]]) if keep_zeros and not kept.all() else None,
        span=BLOCK,
    )
    assert integers is not None
    back = torch.empty_like(integers)
    back[:, order] = integers
    return grid.pack(back)
