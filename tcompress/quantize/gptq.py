"""GPTQ: rounding in which later columns make up for the errors of earlier ones."""

from __future__ import annotations

import torch

from tcompress.packing import PackedWeight
from tcompress.quantize.column_update import BLOCK, fix_columns, inverse_factor
from tcompress.quantize.grid import Grid, checked
from tcompress.quantize.range_search import Range, find_grid
from tcompress.quantize.refine import refine
from tcompress.quantize.scheme import QuantArgs
from tcompress.statistics import InputStatistics, checked_hessian


def gptq(
    weight: torch.Tensor,
    statistics: InputStatistics,
    args: QuantArgs,
    *,
    range: Range = "minmax",
    sweeps: int = 0,
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

    The grid is found on the whole weight before anything moves ("static groups"): columns that share a scale stay
    neighbours whatever the order of the solution, and nothing is permuted at run time. An input that is always zero
    gives no reason to prefer a value: its column is rounded to nearest (the authors' code sets it to zero). If no
    damping makes H positive definite, the whole weight is, with a warning.

    Args:
        weight: [N, K], any float type; computed in float32.
        statistics: of the layer's inputs, with a Hessian. The factor of its inverse is kept there for the next layer
            with the same inputs.
        args: of a `Scheme`'s weights.
        range: of the grid (`find_grid`). "minmax" is the paper's. With "mse" an error in column i costs 1 / U_ii²:
            that is what it adds to ‖(W - Ŵ) X‖² when the columns after it make up for it (equation 2).
        sweeps: of `refine`, after all columns are rounded.
        keep_zeros: what is zero stays zero, so that a pruned weight keeps its pattern.
        act_order: columns in the order of descending diag H, so that the largest inputs are rounded while most others
            can still make up for it; else from the left to the right.
        damping: relative to the mean of H's diagonal.

    Raises:
        ValueError: a weight that is not [N, K] or not finite, statistics without a Hessian, without inputs, or of
            another K, or a weight too large for float16 scales.
    """
    w = checked(weight, "gptq")
    back, grid, _ = gptq_grid(
        w, statistics, args, range=range, keep_zeros=keep_zeros, act_order=act_order, damping=damping
    )
    if sweeps:
        hessian = checked_hessian(statistics, w.shape[1], "gptq").to(w.device)
        diagonal = hessian.diagonal()
        raised = torch.where(diagonal > 0, damping * diagonal.mean(), torch.ones_like(diagonal))
        damped = hessian.clone()
        damped.diagonal().add_(raised)
        grid, back = refine(w, damped, grid, back, sweeps, keep_zeros, "gptq")
    return grid.pack(back)


def gptq_grid(
    weight: torch.Tensor,
    statistics: InputStatistics,
    args: QuantArgs,
    *,
    range: Range,
    keep_zeros: bool = True,
    act_order: bool = True,
    damping: float = 0.01,
) -> tuple[torch.Tensor, Grid, torch.Tensor]:
    """As `gptq`, without refining: integers [N, K], their grid, and the weights [N, K] as they were when their column's
    turn came, of which the integers are the nearest."""
    w = checked(weight, "gptq")
    hessian = checked_hessian(statistics, w.shape[1], "gptq").to(w.device)
    order, factor = _factor(statistics, hessian, act_order, damping)
    importance = torch.empty(w.shape[1], device=w.device)
    importance[order] = factor.diagonal().square().reciprocal()
    grid = find_grid(w, args, "gptq", range, importance)
    places = order.tolist()
    columns = w[:, order]
    kept = columns != 0
    wanted = torch.empty_like(columns)

    def rounding(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        wanted[:, places[k]] = values
        return grid.column(values, places[k])

    _, integers = fix_columns(
        columns,
        factor,
        rounding,
        (lambda values, first: kept[:, first : first + values.shape[1]]) if keep_zeros and not kept.all() else None,
        span=BLOCK,
    )
    assert integers is not None
    back = torch.empty_like(integers)
    back[:, order] = integers
    return back, grid, wanted


def _factor(
    statistics: InputStatistics, hessian: torch.Tensor, act_order: bool, damping: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the columns and the factor in it: found once for all layers with these inputs."""
    key = (act_order, damping)
    found = statistics.factors.get(key)
    if found is None or found[0] is not hessian:
        diagonal = hessian.diagonal()
        order = diagonal.argsort(descending=True, stable=True)
        order = order if act_order else torch.arange(len(order), device=order.device)
        ordered = hessian[order][:, order]
        ordered.diagonal().add_((ordered.diagonal() == 0).float())  # dead columns: on their own, at the end
        found = statistics.factors[key] = hessian, order, inverse_factor(ordered, damping, "gptq")
    return found[1], found[2]
