"""Integers and scales that are found already, made better in turn: coordinate descent and least squares."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from tcompress.quantize.column_update import BLOCK
from tcompress.quantize.grid import Grid, grouped, stored_scale

#: Rows whose least squares are solved at once.
_ROWS = 64


def refine(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    q: torch.Tensor,
    sweeps: int,
    keep_zeros: bool = True,
    where: str = "refine",
) -> tuple[Grid, torch.Tensor]:
    """Lowers tr (W - Ŵ) H (W - Ŵ)ᵀ by sweeps of two moves, each of which can only lower it (up to the rounding of
    scales to the type they are stored in).

    ::

        scales:    for each row, min over s of ‖w - Σ_i s_i c_i‖²_H, c_i the row's centred integers of group i and 0
                   elsewhere: (Cᵀ H C) s = Cᵀ H w
        integers:  for each column i:  q_i = nearest on the grid to  ŵ_i + [H (w - ŵ)]_i / H_ii

    The second is Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885,
    section 3 (cyclic coordinate descent, equation 8); the first is its step for the scales in between.

    Args:
        weight: float32 [N, K].
        hessian: float32 [K, K], damped: with a positive diagonal.
        grid, q: where it begins; q [N, K].
        sweeps: over scales and integers; 0 changes nothing. The scales come once more at the end.
        keep_zeros: weights that are zero stay zero.

    Returns:
        The grid with the new scales, and the new integers.
    """
    if sweeps == 0 or weight.numel() == 0:
        return grid, q
    order = hessian.diagonal().argsort(descending=True, stable=True)
    for _ in range(sweeps):
        grid = _with_scales(weight, hessian, grid, q, where)
        q = _descent(weight, hessian, grid, q, order, keep_zeros)
    return _with_scales(weight, hessian, grid, q, where), q


def _with_scales(weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, q: torch.Tensor, where: str) -> Grid:
    size, groups = grid.group_size, grid.scale.shape[1]
    blocks = F.pad(hessian, (0, -len(hessian) % size, 0, -len(hessian) % size)).view(groups, size, groups, size)
    centred = grouped(q, size) if grid.zero is None else _padded_centred(q, grid)
    target = grouped(weight @ hessian, size)
    scales = []
    for n in range(0, len(q), _ROWS):
        c = centred[n : n + _ROWS]
        a = torch.einsum("nghj,nhj->ngh", torch.einsum("ngi,gihj->nghj", c, blocks), c)
        b = torch.einsum("ngi,ngi->ng", c, target[n : n + _ROWS])
        # A group of zeros has a row of zeros: its scale stays. A little of the diagonal keeps the rest solvable.
        a.diagonal(dim1=1, dim2=2).mul_(1 + 1e-5).add_((a.diagonal(dim1=1, dim2=2) == 0).to(a))
        scales.append(torch.linalg.solve(a, b))
    found = torch.cat(scales)
    usable = torch.isfinite(found) & (found.abs() > grid.scale.float().abs() / 8) & (found.sign() == grid.scale.sign())
    return replace(grid, scale=stored_scale(torch.where(usable, found, grid.scale.float()), grid.args, where))


def _padded_centred(q: torch.Tensor, grid: Grid) -> torch.Tensor:
    """q less its zero points, 0 beyond K."""
    assert grid.zero is not None
    zero = grid.zero.repeat_interleave(grid.group_size, 1)[:, : q.shape[1]]
    return grouped(q - zero, grid.group_size)


def _descent(
    weight: torch.Tensor, hessian: torch.Tensor, grid: Grid, q: torch.Tensor, order: torch.Tensor, keep_zeros: bool
) -> torch.Tensor:
    places = order.tolist()
    hessian = hessian[order][:, order]
    w, q = weight[:, order].t().contiguous(), q[:, order].t().contiguous()  # [K, N]: a column lies together
    values = grid.values(q.t()[:, order.argsort()])[:, order].t().contiguous()
    force = hessian @ (w - values)
    diagonal = hessian.diagonal().tolist()
    kept = w != 0 if keep_zeros else None
    for start in range(0, len(places), BLOCK):
        end = min(start + BLOCK, len(places))
        before, own = values[start:end].clone(), force[start:end]
        for i in range(start, end):
            wanted = torch.add(values[i], own[i - start], alpha=1 / diagonal[i])
            if kept is not None:
                wanted = wanted * kept[i]
            q[i], new = grid.column(wanted, places[i])
            own.addr_(hessian[start:end, i], new - values[i], alpha=-1)
            values[i] = new
        moved = values[start:end] - before
        for rest in (slice(0, start), slice(end, None)):
            force[rest].addmm_(hessian[rest, start:end], moved, alpha=-1)
    back = torch.empty_like(q.t())
    back[:, order] = q.t()
    return back
