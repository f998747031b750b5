"""Half-quadratic quantization: scales and zero points for sparse errors, without data."""

from __future__ import annotations

from dataclasses import replace

import torch

from tcompress.packing import PackedWeight
from tcompress.quantize.grid import Grid, grouped, largest_integer, stored_scale
from tcompress.quantize.range_search import find_grid
from tcompress.quantize.scheme import QuantArgs

#: The authors' values: the norm, its weight against the quadratic term, and by how much that grows each step.
_P, _BETA, _GROWTH, _STEPS = 0.7, 10.0, 1.01, 20


def hqq(weight: torch.Tensor, args: QuantArgs) -> PackedWeight:
    """Finds the grid that leaves a few large errors rather than many: min Σ |W - Ŵ|^p, p = 0.7; Badri and Shaji,
    "Half-Quadratic Quantization of Large Machine Learning Models" (2023), section "Half-quadratic optimization".

    ::

        repeat:  q = nearest to W on the grid,  Ŵ = (q - z) s
                 E = sign(d) max(|d| - |d|^(p-1) / β, 0),  d = W - Ŵ          the errors that may stay, a proximal step
                 asymmetric:  z = round(mean(q - (W - E) / s))
                 symmetric:   s = Σ q (W - E) / Σ q²
                 β = 1.01 β

    for 20 steps; of each group the grid with the smallest Σ |d|^p is kept, the first of them included. The authors
    store zero points as floats; here they are whole, as the kernels take them, and when a step leaves z where it is,
    s moves as in the symmetric case. It begins with the range that has the smallest squared error (`find_grid`), where
    the authors have the whole range, which ends in worse places. Weights are put to the scale of W / max|W|, β's unit.

    Args:
        weight: [N, K], any float type; computed in float32.
        args: of a `Scheme`'s weights.

    Raises:
        ValueError: as `round_to_nearest`.
    """
    grid = find_grid(weight, args, "hqq", "mse")
    w = grouped(weight.detach().float(), grid.group_size)
    if w.numel() == 0:
        return grid.pack(grid.integers(weight))
    # Beyond K nothing counts: a zero there is exactly on the grid and would pull the means.
    real = grouped(torch.ones_like(weight[:1], dtype=torch.float32), grid.group_size)
    unit = w.abs().amax(2, keepdim=True).clamp_min(torch.finfo().tiny)
    best, least = grid, torch.full(grid.scale.shape, torch.inf, device=w.device)
    beta = _BETA
    for step in range(_STEPS + 1):
        q, centred = _integers(w, grid)
        errors = (w - centred * grid.scale.float()[..., None]) * real
        cost = errors.abs().pow(_P).sum(2)
        better = cost < least
        best = _chosen(better, grid, best)
        least = torch.where(better, cost, least)
        if step == _STEPS:
            break
        scaled = errors / unit
        stays = scaled.sign() * (scaled.abs() - scaled.abs().clamp_min(1e-12).pow(_P - 1) / beta).clamp_min(0)
        grid = _moved(w - stays * unit, q, centred, grid, real)
        beta *= _GROWTH
    return best.pack(best.integers(weight))


def _integers(w: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    zero = None if grid.zero is None else grid.zero[..., None]
    q = grid.clamped(torch.round(w / grid.scale.float()[..., None]), zero)
    return q, q if zero is None else q - zero


def _moved(target: torch.Tensor, q: torch.Tensor, centred: torch.Tensor, grid: Grid, real: torch.Tensor) -> Grid:
    """The grid on which the integers lie nearest to the target."""
    zero, still = grid.zero, None
    if zero is not None:
        mean = ((q - target / grid.scale.float()[..., None]) * real).sum(2) / real.sum(2)
        moved = torch.round(mean).clamp(0, largest_integer(grid.args))
        still = moved == zero
        zero = moved
    above, below = (centred * target * real).sum(2), (centred.square() * real).sum(2)
    usable = (below > 0) & (above != 0) if still is None else (below > 0) & (above > 0) & still
    scale = torch.where(usable, above / below.clamp_min(1), grid.scale.float())
    return replace(grid, scale=stored_scale(scale, grid.args, "hqq"), zero=zero)


def _chosen(better: torch.Tensor, new: Grid, old: Grid) -> Grid:
    zero = None if new.zero is None or old.zero is None else torch.where(better, new.zero, old.zero)
    return replace(old, scale=torch.where(better, new.scale, old.scale), zero=zero)
