"""Quantization error propagation: a layer's weight that makes up for what the layers before it lost already."""

from __future__ import annotations

import torch

from tcompress.errors import message
from tcompress.statistics import InputStatistics, checked_hessian


def propagated_weight(
    weight: torch.Tensor, statistics: InputStatistics, strength: float = 0.5, damping: float = 0.01
) -> torch.Tensor:
    """The weight whose outputs on the compressed model's inputs x̂ are nearest to what the original's are on its own
    inputs x: min over W* of ‖W X - W* X̂‖², for `strength` 1. Arai and Ichikawa, "Quantization Error Propagation:
    Revisiting Layer-Wise Post-Training Quantization", arXiv 2504.09629, section 4, equation for W*(α)::

        W* = W + α W (X - X̂) X̂ᵀ (X̂ X̂ᵀ + λI)⁻¹,   λ = damping · mean(diag X̂ X̂ᵀ)

    Args:
        weight: [N, K], any float type.
        statistics: of x̂, with a Hessian and with what the original model's inputs were (`InputStatistics.add`).
        strength: α, 0 … 1; less than 1 keeps a few calibration tokens from being learned by heart.

    Returns:
        float32 [N, K].

    Raises:
        ValueError: statistics without a Hessian or without the original inputs.
    """
    hessian = checked_hessian(statistics, weight.shape[1], "propagated_weight").double()
    if statistics.shift is None:
        raise ValueError(message("propagated_weight", "statistics", "no original inputs", "add(x, original)"))
    damped = hessian + torch.eye(len(hessian), dtype=torch.float64, device=hessian.device) * (
        damping * hessian.diagonal().mean()
    )
    # H is symmetric: C H⁻¹ = (H⁻¹ Cᵀ)ᵀ. lu, not Cholesky: what is not positive definite is solved as well as it can be.
    correction = torch.linalg.solve(damped, statistics.shift.double().t()).t()
    moved = weight.float() + strength * weight.float() @ correction.float().to(weight.device)
    return moved if torch.isfinite(moved).all() else weight.float()
