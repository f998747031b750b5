"""Bias correction: the mean of what quantization does to a layer's output goes into its bias."""

from __future__ import annotations

import torch

from tcompress.statistics import InputStatistics, check_count


def corrected_bias(
    bias: torch.Tensor, weight: torch.Tensor, quantized: torch.Tensor, statistics: InputStatistics
) -> torch.Tensor:
    """`b + (W - Ŵ) E[x]`: with it the mean of every output over the data is what it was. Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2, with E[x] from data
    (appendix D).

    Args:
        bias: [N], any float type, which the result has too.
        weight, quantized: W and Ŵ, [N, K].
        statistics: of the layer's inputs.

    Raises:
        ValueError: statistics without inputs, or of another K.
    """
    check_count(statistics, weight.shape[1], "corrected_bias")
    mean = statistics.mean.to(weight.device)
    return (bias.float() + (weight.float() - quantized.float()) @ mean).to(bias.dtype)
