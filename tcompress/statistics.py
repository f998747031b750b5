"""What a linear layer's inputs look like on the calibration data: what GPTQ, SparseGPT, Wanda and others decide by."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import nn

from tcompress.distances import sqnr_db
from tcompress.errors import message
from tcompress.padding import counted


class InputStatistics:
    """Sums over the inputs x [K] of one linear layer, added batch by batch.

    Rows with a NaN, an infinity, or a sum of squares beyond float32 are left out and counted: one of them would spoil
    every sum. Padding of the batch that `calibrate.run` is running is no input (`padding.counted`). Everything is
    accumulated in float32 on the device of the inputs.

    Attributes:
        hessian: float32 [K, K], 2/n Σ x xᵀ: of ‖(W - Ŵ) X‖² / n with regard to a row of Ŵ. None if it was not wanted.
        count: n, how many inputs (tokens) are in the sums.
        left_out: how many were not taken for what they hold. padding: how many the batch's mask leaves out.
        shift: float32 [K, K], 2/n Σ (x₀ - x) xᵀ with x₀ the original model's inputs, or None where they were not given.
        max_abs: float32 [K], max |x|.
        factors: of the Hessian's inverse, which algorithms leave here for the next layer with the same inputs.
    """

    def __init__(self, in_features: int, hessian: bool = True, device: torch.device | str | None = None) -> None:
        self.count = self.left_out = self.padding = 0
        self.hessian = torch.zeros(in_features, in_features, device=device) if hessian else None
        self.shift: torch.Tensor | None = None
        self.max_abs = torch.zeros(in_features, device=device)
        self.factors: dict[Hashable, tuple[torch.Tensor, ...]] = {}
        self._sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        self._sum_abs = torch.zeros(in_features, device=device)
        self._sum_squares = torch.zeros(in_features, device=device)

    def add(self, x: torch.Tensor, original: torch.Tensor | None = None) -> None:
        """Adds inputs [..., K] of any float type.

        Args:
            original: what the original model's inputs were in their place, in every call or in none.

        Raises:
            ValueError: another K, or another shape of `original`.
        """
        k = self.max_abs.shape[0]
        if x.shape[-1:] != (k,):
            raise ValueError(message("InputStatistics", "x", list(x.shape), f"[..., {k}]"))
        if original is not None and original.shape != x.shape:
            raise ValueError(message("InputStatistics", "original", list(original.shape), list(x.shape)))
        rows = _rows(x)
        before = None if original is None else _rows(original)
        self.padding += x.shape[:-1].numel() - len(rows)
        squares = rows.square()
        finite = rows if before is None else rows + before
        # A row with NaN or infinity has a sum of squares that is one of them.
        good = torch.isfinite(squares.sum(1)) & torch.isfinite(finite.sum(1))
        taken = int(good.count_nonzero())
        self.left_out += len(rows) - taken
        if taken == 0:
            return
        if taken < len(rows):
            rows, squares = rows[good], squares[good]
            before = None if before is None else before[good]
        if self.hessian is not None:
            # A running mean: sums of squares would lose their last digits as they grow.
            total = self.count + taken
            self.hessian.addmm_(rows.t(), rows, beta=self.count / total, alpha=2 / total)
        if before is not None:
            total = self.count + taken
            if self.shift is None:
                self.shift = torch.zeros(k, k, device=rows.device)
            self.shift.addmm_((before - rows).t(), rows, beta=self.count / total, alpha=2 / total)
        self.count += taken
        self.factors.clear()
        self._sum += rows.sum(0)
        magnitude = rows.abs()
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(0))
        self._sum_abs += magnitude.sum(0)
        self._sum_squares += squares.sum(0)

    @property
    def norm(self) -> torch.Tensor:
        """float32 [K], √Σx²: the L2 norm of each input channel over all tokens."""
        return self._sum_squares.sqrt()

    @property
    def mean(self) -> torch.Tensor:
        """float32 [K], the mean of x."""
        return (self._sum / max(self.count, 1)).float()

    @property
    def mean_square(self) -> torch.Tensor:
        """float32 [K], the mean of x², half of the Hessian's diagonal."""
        return self._sum_squares / max(self.count, 1)

    @property
    def mean_abs(self) -> torch.Tensor:
        """float32 [K], the mean of |x|."""
        return self._sum_abs / max(self.count, 1)

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook, registered with_kwargs: adds the input of each call."""
        self.add(args[0] if args else next(iter(kwargs.values())))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """float32 [M, K] of the tokens that count."""
    x = counted(x.detach())
    return x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()


def checked_hessian(statistics: InputStatistics, in_features: int, where: str) -> torch.Tensor:
    """The Hessian of a layer with so many inputs; `where` begins error messages.

    Raises:
        ValueError: it was not collected, nothing was, or it is that of another layer.
    """
    if statistics.hessian is None:
        raise ValueError(message(where, "statistics", "none of the Hessian", "InputStatistics(hessian=True)"))
    check_count(statistics, in_features, where)
    return statistics.hessian


def check_count(statistics: InputStatistics, in_features: int, where: str) -> None:
    """Raises ValueError where the statistics are of no input at all, or of another number of features."""
    k = statistics.max_abs.shape[0]
    if k != in_features:
        raise ValueError(message(where, "statistics", f"{k} features", f"{in_features}, as the weight has"))
    if statistics.count == 0:
        hint = f"{statistics.left_out} inputs held NaN or infinity"
        raise ValueError(message(where, "statistics", "no inputs", "at least one token", hint))


def output_sqnr_db(weight: torch.Tensor, changed: torch.Tensor, hessian: torch.Tensor) -> float:
    """10·log10(Σ‖Wx‖² / Σ‖(Ŵ-W)x‖²) over the inputs x that a Hessian is of: tr(W H Wᵀ) / tr((Ŵ-W) H (Ŵ-W)ᵀ).

    Args:
        weight, changed: [N, K]. hessian: [K, K].
    """
    weight = weight.float()
    error = changed.float() - weight
    signal, noise = (float(((w @ hessian) * w).sum(dtype=torch.float64)) for w in (weight, error))
    return sqnr_db(signal, noise)
