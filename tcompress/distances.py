"""How far tensors are from each other, in float64, piece by piece: a sample's logits can be as large as a model."""

from __future__ import annotations

import math

import torch

#: Elements that are converted to float64 at a time.
PIECE = 2**20


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in decibels, from two sums of squares."""
    if not math.isfinite(noise) or not math.isfinite(signal):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of two tensors taken as vectors."""
    sums = [0.0, 0.0, 0.0]
    for x, y in zip(a.detach().flatten().split(PIECE), b.detach().flatten().split(PIECE), strict=True):
        x, y = x.double(), y.double()
        for n, value in enumerate((x @ y, x @ x, y @ y)):
            sums[n] += float(value)
    dot, one, other = sums
    # As torch.nn.functional.cosine_similarity: each norm is at least 1e-8.
    return dot / (max(math.sqrt(one), 1e-8) * max(math.sqrt(other), 1e-8)) if dot == dot else math.nan


def squared_errors(weight: torch.Tensor, stored: torch.Tensor) -> tuple[float, float]:
    """ΣW² and Σ(Ŵ - W)² in float64, piece by piece."""
    signal = noise = 0.0
    rows = max(PIECE // max(weight.shape[1:].numel(), 1), 1)
    for w, s in zip(weight.detach().split(rows), stored.detach().split(rows), strict=True):
        w, s = w.double(), s.double()
        signal += float(w.square().sum())
        noise += float((s - w).square().sum())
    return signal, noise


def finite(output: torch.Tensor) -> bool:
    """Whether it holds neither NaN nor infinity."""
    return all(bool(torch.isfinite(part).all()) for part in output.flatten().split(PIECE))
