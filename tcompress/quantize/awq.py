"""AWQ: the scales that protect the weights of large inputs."""

from __future__ import annotations

import torch

from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import QuantArgs

#: How many exponents are tried, as in the paper.
RATIOS = 20


def awq_scales(input_mean: torch.Tensor, ratio: float) -> torch.Tensor:
    """By how much to multiply each weight column j; Lin et al., "AWQ: Activation-aware Weight Quantization for
    LLM Compression and Acceleration", arXiv 2306.00978, section 3.2, equation 5, normalised as in the authors' code::

        s_j = mean|X_j|^ratio / √(max s · min s)

    Args:
        input_mean: float32 [K], mean|X_j| over calibration tokens; where it is 0, s is 1 after the normalisation.
        ratio: 0 … 1; 0 gives ones.
    """
    seen = input_mean > 0
    if not seen.any():
        return torch.ones_like(input_mean)
    s = input_mean.float().clamp_min(1e-4) ** ratio
    s = s / (s[seen].max() * s[seen].min()).sqrt()
    return torch.where(seen & torch.isfinite(s), s, 1.0)


def weight_error(weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor | None, args: QuantArgs) -> float:
    """‖(Q(W s) / s - W) X‖² · 2/n = tr(Δ H Δᵀ): what rounding to nearest does to a layer's output on the data.

    Args:
        weight: [N, K]. hessian: float32 [K, K], 2/n Σ x xᵀ (`InputStatistics`). scales: [K], or None for 1.
        args: of a scheme's weights.
    """
    w = weight.detach().float()
    rounded = round_to_nearest(w if scales is None else w * scales, args).dequantize()
    delta = (rounded if scales is None else rounded / scales) - w
    return float(((delta @ hessian) * delta).sum(dtype=torch.float64))
