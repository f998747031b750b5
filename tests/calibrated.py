"""Layers with correlated inputs, and the optimal brain surgeon written down plainly."""

from __future__ import annotations

import numpy as np
import torch

from tcompress.statistics import InputStatistics


def weight(n, k, seed=0):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed))


def correlated(k, tokens=512, seed=1):
    """Inputs with a few strong directions and channels of very different size, as those of Transformers are."""
    generator = torch.Generator().manual_seed(seed)
    rank = max(k // 8, 1)
    x = torch.randn(tokens, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    x += 0.3 * torch.randn(tokens, k, generator=generator)
    return x * torch.exp(0.7 * torch.randn(k, generator=generator))


def statistics_of(x):
    statistics = InputStatistics(x.shape[1])
    statistics.add(x)
    return statistics


def output_error(w, approximation, x):
    """‖(W - Ŵ) X‖ / ‖W X‖ in float64."""
    w, approximation, x = w.double(), approximation.double(), x.double()
    return float(((w - approximation) @ x.T).norm() / (w @ x.T).norm())


def damped(x, damping=0.01):
    """H + λI in float64."""
    h = 2 * x.double().T @ x.double() / len(x)
    return (h + torch.eye(len(h), dtype=torch.float64) * damping * h.diagonal().mean()).numpy()


def surgeon(w, hessian, order, replace, choose=None):
    """Replaces columns in this order. The inverse of the Hessian over the columns that are left comes from eliminating
    one row and column after the other (Optimal Brain Quantization, arXiv 2208.11580, equation 4), where the algorithms
    have a Cholesky factor.

    replace: (values [N], column) -> values. choose: (values [N, K], costs [K], step), called before each column; costs
    are [H⁻¹]_ii over i and the columns after it.
    """
    w = w.double().numpy().copy()
    inverse = np.linalg.inv(hessian)
    rows = []  # of each column, the inverse's row at its turn
    for i in order:
        rows.append(inverse[i].copy())
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    costs = np.empty(len(order))
    costs[order] = [row[i] for row, i in zip(rows, order, strict=True)]
    for step, i in enumerate(order):
        if choose is not None:
            choose(w, costs, step)
        left = order[step:]
        new = replace(w[:, i], i)
        w[:, left] -= np.outer((w[:, i] - new) / costs[i], rows[step][left])
        w[:, i] = new
    return torch.from_numpy(w)
