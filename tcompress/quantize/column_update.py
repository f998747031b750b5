"""Optimal brain surgeon, column by column: what GPTQ and SparseGPT have in common.

A column of the weight is replaced (rounded, set to zero), and the columns after it take over its error, as far as
correlated inputs allow. For one row w with the Hessian H = 2/n X Xᵀ of ‖(w - ŵ) X‖²/n, replacing w_i by q_i and
moving the rest optimally costs and takes (Hassibi and Stork 1993; GPTQ, arXiv 2210.17323, equation 2)::

    cost = (w_i - q_i)² / (2 [H⁻¹]_ii)          δ = -(w_i - q_i) / [H⁻¹]_ii · [H⁻¹]_i,rest

with the inverse of H over the columns that are still free. Fixing them from left to right, these inverses' rows are the
rows of one upper triangular U with H⁻¹ = Uᵀ U: [H⁻¹]_ii = U_ii², [H⁻¹]_i,rest = U_ii · U_i,rest (section 3.3, step 3).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial

import torch

from tcompress.errors import CompressionWarning

#: Columns whose errors are added to the rest of the weight together (GPTQ's lazy batches, section 3.3, step 2).
BLOCK = 128
#: Within them, columns whose errors are added to the rest of the block together. Column by column across all 128 the
#: updates took most of the time: bound by memory, with threads that wait for each other.
_INNER = 16
#: By how much the damping grows where the factorization fails, and how often.
_LADDER = (1, 10, 100)

#: (column values [N], k) -> (integers [N], values [N]) in its place.
Rounding = Callable[[torch.Tensor, int], tuple[torch.Tensor, torch.Tensor]]


def inverse_factor(hessian: torch.Tensor, damping: float, where: str) -> torch.Tensor:
    """U, upper triangular, float32 [K, K], with (H + λI)⁻¹ = Uᵀ U and λ = damping · mean(diag H).

    It is the inverse of the R in H + λI = R Rᵀ, R upper triangular, and R is a Cholesky factor read backwards: one
    factorization and one triangular inverse in float64. Where H is not positive definite all the same, λ grows tenfold,
    twice; then the diagonal is raised to its mean at least. If that fails too, the result is I, by which nothing makes
    up for errors, with a warning that begins with `where`.

    Args:
        hessian: [K, K] with a positive diagonal.
    """
    identity = partial(torch.eye, len(hessian), device=hessian.device)
    if hessian.numel() == 0:
        return identity()
    for step in (*_LADDER, None):
        # Two float64 matrices at a time: they are the largest things that solving a layer takes.
        damped = hessian.flip(0, 1).double()
        mean = damped.diagonal().mean()
        if step is None:
            damped.diagonal().clamp_(min=mean)
        damped.diagonal().add_(mean * damping * (step or _LADDER[-1]))
        factor, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed and torch.isfinite(factor).all():
            inverse = identity(dtype=torch.float64)
            torch.linalg.solve_triangular(factor, inverse, upper=False, out=inverse)
            del factor
            return inverse.float().flip(0, 1)
    text = f"{where}: the Hessian has no Cholesky factor even with its diagonal raised: no weight makes up for another"
    warnings.warn(text, CompressionWarning, stacklevel=3)
    return identity()


def fix_columns(
    weight: torch.Tensor,
    factor: torch.Tensor,
    rounding: Rounding | None,
    keep: Callable[[torch.Tensor, int], torch.Tensor] | None,
    block: int = BLOCK,
    span: int = 1,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replaces all columns from the left to the right.

    ::

        for each block of columns, for each column i in it:
            q = rounding(kept ? w_i : 0);  e = (w_i - q) / U_ii;  w_j -= e U_ij  for j > i in the block
        w_j -= Σ e_i U_ij                                         for j beyond the block

    Args:
        weight: float32 [N, K]; unchanged.
        factor: `inverse_factor`.
        rounding: what a column becomes; None leaves its values.
        keep: (current values [N, span], first column) -> bool [N, span], called for each `span` columns as they are
            reached; False becomes zero. None keeps all.
        block: columns that are up to date when the first of them is reached; a multiple of span.
        span: columns over which `keep` decides at once.

    Returns:
        The values [N, K], and the integers that `rounding` gave, or None.
    """
    n, k = weight.shape
    columns = weight.t().contiguous()  # [K, N]: a column lies together
    integers = torch.empty_like(columns) if rounding else None
    inner = span * max(_INNER // span, 1) if span < block else _INNER
    for start in range(0, k, block):
        end = min(start + block, k)
        errors = columns.new_zeros(end - start, n)
        for first in range(start, end, inner):
            last = min(first + inner, end)
            part, upper, own = columns[first:last], factor[first:last, first:last], errors[first - start : last - start]
            diagonal = upper.diagonal().tolist()
            for i in range(last - first):
                if keep is not None and (first + i - start) % span == 0:
                    kept, chosen = keep(columns[first + i : min(first + i + span, end)].t(), first + i).t(), first + i
                w = part[i].clone()
                q = w if keep is None else w * kept[first + i - chosen]
                if rounding is not None:
                    assert integers is not None
                    integers[first + i], q = rounding(q, first + i)
                torch.div(w - q, diagonal[i], out=own[i])
                part[i + 1 :].addr_(upper[i, i + 1 :], own[i], alpha=-1)
                part[i] = q
            columns[last:end].addmm_(factor[first:last, last:end].t(), own, alpha=-1)
        columns[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return columns.t().contiguous(), None if integers is None else integers.t().contiguous()
