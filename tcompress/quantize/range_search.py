"""Which part of a weight's range the grid spans: less than all of it where that costs less."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch

from tcompress.errors import message
from tcompress.quantize.grid import Grid, checked, grouped, largest_integer, stored_scale
from tcompress.quantize.scheme import QuantArgs

#: Ways to find a range.
Range = Literal["minmax", "percentile", "mse"]
#: What "percentile" keeps of the magnitudes of an output channel; of a group of 128, all but the largest weight.
PERCENTILE = 99.5
#: The parts of the whole range that are tried. A Gaussian row of a thousand weights at 4 bits wants 0.65, one with a
#: few outliers less.
_SHRINK = tuple(1 - 0.05 * i for i in range(15))
#: Least squares after that: each step finds the best scale for the integers, and these for the scale.
_LEAST_SQUARES = 3
#: Weights that are worked on at once, so that memory stays small beside a large layer.
_CHUNK = 2**20


def find_grid(
    weight: torch.Tensor,
    args: QuantArgs,
    where: str,
    method: Range = "minmax",
    importance: torch.Tensor | None = None,
) -> Grid:
    """The grid of a weight [N, K] by a range found in one of three ways.

    ::

        minmax:      from the smallest to the largest weight of what shares a scale (`Grid.of`)
        percentile:  the same after clipping |W| to its 99.5th percentile
        mse:         min over the scale of Σ_k importance_k (w_k - ŵ_k)²: 15 parts of the whole range, 1 down to 0.3,
                     then three times the least-squares scale for the integers, s = Σ i·w·q / Σ i·q²

    With "mse", symmetric integers of up to 4 bits use all of what is stored, -8 to 7 for 4 bits, and the scale may be
    negative: the larger end of the range then falls on -8, and the step is 7/8 of what it would be. (Nagel et al., "A
    White Paper on Neural Network Quantization", arXiv 2106.08295, section 3.1: ranges by mean squared error.)

    Args:
        weight: any float type; computed in float32.
        args: of a `Scheme`'s weights.
        where: begins error messages.
        importance: [K], not negative: what an error in each input's weight costs; by default 1.

    Raises:
        ValueError: as `Grid.of`, or an importance that is not [K].
    """
    w = checked(weight, where)
    if importance is not None and importance.shape != w.shape[1:]:
        raise ValueError(message(where, "importance", list(importance.shape), f"[{w.shape[1]}]"))
    if method == "percentile":
        return _percentile(w, args, where)
    grid = Grid.of(w, args, where)
    if method == "minmax" or w.numel() == 0:
        return grid
    full = args.symmetric and args.bits <= 4
    importance = torch.ones(w.shape[1], device=w.device) if importance is None else importance.to(w)
    costs = grouped(importance[None], grid.group_size)
    rows = max(_CHUNK // w.shape[1], 1)
    parts = [
        _searched(
            grouped(w[n : n + rows], grid.group_size),
            costs,
            replace(
                grid,
                shape=(len(w[n : n + rows]), w.shape[1]),
                scale=grid.scale[n : n + rows],
                zero=None if grid.zero is None else grid.zero[n : n + rows],
                full_range=full,
            ),
            where,
        )
        for n in range(0, len(w), rows)
    ]
    zero = None if grid.zero is None else torch.cat([z for _, z in parts if z is not None])
    return replace(grid, scale=torch.cat([s for s, _ in parts]), zero=zero, full_range=full)


def _percentile(w: torch.Tensor, args: QuantArgs, where: str) -> Grid:
    if w.numel() == 0:
        return Grid.of(w, args, where)
    groups = grouped(w, args.group_size or w.shape[1])
    limit = torch.quantile(groups.abs(), PERCENTILE / 100, dim=2, keepdim=True)
    return Grid.of(groups.clamp(-limit, limit).flatten(1)[:, : w.shape[1]], args, where)


def _searched(
    groups: torch.Tensor, costs: torch.Tensor, grid: Grid, where: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales as stored and zero points of groups [N, G, g] with costs [1, G, g]."""
    args, q_max = grid.args, largest_integer(grid.args)
    best_scale, best_zero = grid.scale, grid.zero
    least = _cost(groups, costs, grid)[0]

    def try_(scale: torch.Tensor, zero: torch.Tensor | None) -> None:
        nonlocal best_scale, best_zero, least
        found = _cost(groups, costs, replace(grid, scale=scale, zero=zero))[0]
        better = found < least
        best_scale, least = torch.where(better, scale, best_scale), torch.where(better, found, least)
        if best_zero is not None and zero is not None:
            best_zero = torch.where(better, zero, best_zero)

    lo, hi = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    for part in _SHRINK:
        if args.symmetric:
            largest = torch.maximum(-lo, hi)
            try_(stored_scale(largest * (part / q_max), args, where), None)
            if grid.full_range:  # -2^(bits-1) for the end that is further away
                try_(stored_scale(torch.where(hi > -lo, -hi, -lo) * (part / (q_max + 1)), args, where), None)
        else:
            scale = stored_scale((hi - lo) * (part / q_max), args, where)
            try_(scale, torch.round(-lo * part / scale.float()).clamp(0, q_max))
    for _ in range(_LEAST_SQUARES):
        _, q = _cost(groups, costs, replace(grid, scale=best_scale, zero=best_zero))
        weighted = q * costs
        above, below = (weighted * groups).sum(2), (weighted * q).sum(2)
        scale = torch.where(above != 0, above / below.clamp_min(torch.finfo().tiny), best_scale.float())
        try_(stored_scale(scale, args, where), best_zero)
    return best_scale, best_zero


def _cost(groups: torch.Tensor, costs: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ costs · error² of each group, and the integers less their zero points."""
    scale = grid.scale.float()[..., None]
    zero = None if grid.zero is None else grid.zero[..., None]
    q = grid.clamped(torch.round(groups / scale), zero)
    q = q if zero is None else q - zero
    return (torch.addcmul(-groups, q, scale).square_() * costs).sum(2), q
