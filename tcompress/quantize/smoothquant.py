"""SmoothQuant: the scales that make activations easier to quantize and weights harder."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from tcompress.ops.quantize_per_token import quantize_per_token
from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import Scheme

#: The exponents that a search tries.
ALPHAS = tuple(i / 10 for i in range(1, 10))
#: Scales are at least this, as in the authors' code.
_LEAST = 1e-5


def smooth_scales(input_max: torch.Tensor, weight_max: torch.Tensor, alpha: float) -> torch.Tensor:
    """By how much to divide each input channel j; Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training
    Quantization for Large Language Models", arXiv 2211.10438, section 4, equation 4::

        s_j = max|X_j|^α / max|W_j|^(1 - α)

    Args:
        input_max: float32 [K], max|X_j| over calibration tokens. weight_max: [K], max|W_j| over the output channels of
            all layers that read the channel.
        alpha: migration strength, 0 … 1; 0.5 makes both maxima equal.

    Returns:
        float32 [K] of at least 1e-5; 1 where either maximum is 0, which leaves nothing to move.
    """
    scales = (input_max.float() ** alpha / weight_max.float() ** (1 - alpha)).clamp_min(_LEAST)
    return torch.where((input_max > 0) & (weight_max > 0) & torch.isfinite(scales), scales, 1.0)


def output_error(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, scheme: Scheme) -> float:
    """Σ(Q(X / s) Q(W s)ᵀ - X Wᵀ)²: what quantization does to a layer's output when its inputs are divided by s.

    Args:
        x: [M, K]. weight: [N, K]. scales: [K], or None for 1.
        scheme: weights are rounded to nearest, activations per token, or all by the range of these where it is static;
            left alone where the scheme does.
    """
    x, weight = x.float(), weight.detach().float()
    divided, scaled = (x, weight) if scales is None else (x / scales, weight * scales)
    if scheme.activations is not None:
        together = divided.reshape(1, -1) if scheme.static else divided
        q, step, zero = quantize_per_token(together, scheme.activations.bits, scheme.activations.symmetric)
        divided = ((q.float() - zero) * step).view_as(divided)
    rounded = round_to_nearest(scaled, scheme.weights).dequantize()
    return float((F.linear(divided, rounded) - F.linear(x, weight)).double().square().sum())


def best_alpha(errors: Sequence[float], unscaled: float) -> float | None:
    """Of `ALPHAS` the one with the smallest error, or None if no scales at all have a smaller one."""
    best = min(range(len(ALPHAS)), key=errors.__getitem__)
    return ALPHAS[best] if errors[best] < unscaled else None
