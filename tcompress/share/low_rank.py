"""Low-rank factors: one linear layer becomes two thin ones."""

from __future__ import annotations

import torch

from tcompress.errors import message


def low_rank_factors(
    weight: torch.Tensor, rank: int, hessian: torch.Tensor | None = None, damping: float = 1e-4
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best `W ≈ B A` of a rank: for the weight, or for the layer's output on data.

    ::

        without data   W = U Σ Vᵀ;    B = U_r √Σ_r,  A = √Σ_r V_rᵀ            minimises ‖W - B A‖  (Eckart-Young)
        with           H = S Sᵀ,  W S = U Σ Vᵀ;    A = √Σ_r V_rᵀ S⁻¹          minimises ‖(W - B A) X‖

    The second is Wang et al., "SVD-LLM", arXiv 2403.07378, section 3.1 ("truncation-aware data whitening"): with S the
    Cholesky factor of the inputs' second moments, each singular value that is cut off costs the output exactly its
    square. Computed in float64.

    Args:
        weight: [N, K], any float type.
        rank: r, 1 … min(N, K).
        hessian: [K, K], of the layer's inputs up to a factor (`InputStatistics.hessian`), or None.
        damping: times the mean of the Hessian's diagonal is added to it.

    Returns:
        B [N, r] and A [r, K], in the type of the weight.

    Raises:
        TypeError: the weight is not of a float type. ValueError: a shape or the rank does not fit, or the weight or the
            Hessian holds NaN or infinity.
    """
    where = "low_rank_factors"
    if not weight.is_floating_point():
        raise TypeError(message(where, "weight", weight.dtype, "a float type"))
    if weight.dim() != 2:
        raise ValueError(message(where, "weight", list(weight.shape), "[N, K]"))
    k = weight.shape[1]
    if not 1 <= rank <= min(weight.shape):
        raise ValueError(message(where, "rank", rank, f"1 to {min(weight.shape)}"))
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(message(where, "weight", "NaN or infinity", "finite values", "repair the checkpoint"))
    w = weight.detach().double()
    if hessian is None:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        root = s[:rank].sqrt()
        return (u[:, :rank] * root).to(weight.dtype), (root[:, None] * vh[:rank]).to(weight.dtype)
    if hessian.shape != (k, k):
        raise ValueError(message(where, "hessian", list(hessian.shape), [k, k]))
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(message(where, "hessian", "NaN or infinity", "finite values"))
    h = hessian.double()
    mean = float(h.diagonal().mean())
    factor = _cholesky(h, max(mean, 1e-30) * damping)
    u, s, vh = torch.linalg.svd(w @ factor, full_matrices=False)
    root = s[:rank].sqrt()
    right = torch.linalg.solve_triangular(factor, root[:, None] * vh[:rank], upper=False, left=False)
    return (u[:, :rank] * root).to(weight.dtype), right.to(weight.dtype)


def rank_for(shape: tuple[int, int], ratio: float) -> int:
    """The largest rank whose factors have at most `ratio` of the parameters of a weight [N, K]; 0 if there is none."""
    n, k = shape
    return min(int(ratio * n * k / (n + k)), min(n, k))


def _cholesky(h: torch.Tensor, damping: float) -> torch.Tensor:
    """The lower factor of a matrix that is damped until it has one; a Hessian of few tokens is singular."""
    for _ in range(12):
        factor, failed = torch.linalg.cholesky_ex(h + damping * torch.eye(len(h), dtype=h.dtype, device=h.device))
        if not bool(failed):
            return factor
        damping *= 10
    raise ValueError(message("low_rank_factors", "hessian", "one that is not positive definite", "Σ x xᵀ"))
