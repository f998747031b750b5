"""How far quantized attention is from floating point on what a model really computes, overall and per head."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch

from tcompress.nn.int8_attention import Int8Attention
from tcompress.ops.float_attention import float_attention
from tcompress.ops.quantized_attention import quantized_attention
from tcompress.padding import counted


class AttentionError:
    """Compares, at each call of an `Int8Attention`, `ops.quantized_attention` with floating point.

    With O the result in floating point and Δ the difference, both over all calls, queries (but padding) and channels::

        cosine       Σ O (O + Δ) / √(ΣO² Σ(O + Δ)²)
        relative_l1  Σ|Δ| / Σ|O|
        rmse         √(mean Δ²)

    Args:
        bits: of the quantized one.
    """

    def __init__(self, bits: Literal[8, 12]) -> None:
        self.bits: Literal[8, 12] = bits
        self.calls = 0
        #: By head: ΣO·(O+Δ), ΣO², Σ(O+Δ)², Σ|Δ|, Σ|O|, ΣΔ², number of elements.
        self._sums = torch.zeros(7, 0, dtype=torch.float64)

    def hook(self, module: Int8Attention, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        """A forward hook, to be registered with_kwargs=True."""
        options = {key: value for key, value in kwargs.items() if key != "dropout"}
        expected = output if module.precision == "float" else float_attention(*args, **options)
        got = quantized_attention(*args, bits=self.bits, **options)
        assert isinstance(got, torch.Tensor)
        self.add(expected, got)

    def add(self, expected: torch.Tensor, got: torch.Tensor) -> None:
        """Takes in a pair of results, [B, H, Sq, Dv]."""
        o, p = (counted(t.transpose(1, 2)).double() for t in (expected, got))  # [B, Sq, H, Dv], or [R, H, Dv]
        delta = p - o
        parts = (o * p, o * o, p * p, delta.abs(), o.abs(), delta * delta, torch.ones_like(o))
        sums = torch.stack([part.flatten(0, -3).sum((0, 2)) for part in parts]).cpu()
        more = sums.shape[1] - self._sums.shape[1]
        old = torch.nn.functional.pad(self._sums, (0, max(more, 0)))
        self._sums = old + torch.nn.functional.pad(sums, (0, max(-more, 0)))
        self.calls += 1

    @property
    def heads(self) -> list[tuple[float, float, float]]:
        """(cosine, relative_l1, rmse) of each head."""
        return [_numbers(column) for column in self._sums.T]

    @property
    def total(self) -> tuple[float, float, float]:
        """(cosine, relative_l1, rmse) over all heads."""
        return _numbers(self._sums.sum(1))


def _numbers(sums: torch.Tensor) -> tuple[float, float, float]:
    dot, oo, pp, delta, magnitude, squares, count = sums.tolist()
    cosine = dot / math.sqrt(oo * pp) if oo * pp > 0 else 1.0 if oo == pp == 0 else 0.0
    relative = delta / magnitude if magnitude > 0 else 0.0 if delta == 0 else math.inf
    if not math.isfinite(dot + oo + pp):
        cosine = relative = math.nan
    return min(cosine, 1.0), relative, math.sqrt(squares / count) if count else 0.0
