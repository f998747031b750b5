"""The linear layers that are compared: what they get, and what they should give."""

from __future__ import annotations

import torch
from problem import Problem
from shapes import LinearShape


class Linear(Problem[LinearShape]):
    """`x wᵀ + b`; the error is relative, in the Euclidean norm."""

    def inputs(self, shape: LinearShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(shape.m, shape.k, generator=generator)
        w = torch.randn(shape.n, shape.k, generator=generator) / shape.k**0.5
        b = torch.randn(shape.n, generator=generator)
        return x, w, b

    def expected(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return x.double() @ w.double().t() + b.double()

    def errors(self, got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
        return {"relative_error": float((got.double() - expected).norm() / expected.norm())}
