"""Observers: the range of a tensor that comes batch by batch, for scales that are fixed in advance.

Activations have a scale for each token, found as they come (`ops.quantize_per_token`), and need no observer, unless the
scheme is static (`input_scales`); ranges of weights are `range_search`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch

from tcompress.errors import message

#: By which a step may name an observer.
ObserverName = Literal["minmax", "percentile", "mse", "moving_average"]
_BINS = 4096
_CANDIDATES = 100


@dataclass(frozen=True)
class InputScale:
    """What quantizes the inputs of a layer whose activations are static: `x ≈ (q - zero_point) * scale`.

    Attributes:
        scale: positive. zero_point: None if symmetric.
        lo, hi: the range that was observed.
    """

    scale: float
    zero_point: int | None
    lo: float
    hi: float


class Observer(ABC):
    """Collects a range of `count` values. Those that are NaN or infinite are left out and counted in `left_out`."""

    def __init__(self) -> None:
        self.count = self.left_out = 0

    def observe(self, x: torch.Tensor) -> None:
        """Adds a batch, any float type and shape."""
        values = x.detach().float().flatten()
        finite = torch.isfinite(values)
        good = int(finite.count_nonzero())
        self.left_out += values.numel() - good
        self.count += good
        if good:
            self._add(values if good == values.numel() else values[finite])

    @abstractmethod
    def _add(self, values: torch.Tensor) -> None: ...

    @abstractmethod
    def range(self) -> tuple[float, float]:
        """(lo, hi), zero between them.

        Raises:
            ValueError: nothing was observed.
        """

    def scale(self, bits: int, symmetric: bool) -> tuple[float, int]:
        """Scale and zero point of integers of so many bits, as in `Grid`: symmetric ones in ±(2^(bits-1) - 1)."""
        lo, hi = self.range()
        if symmetric:
            return max(max(-lo, hi) / (2 ** (bits - 1) - 1), torch.finfo().tiny), 0
        q_max = 2**bits - 1
        scale = max((hi - lo) / q_max, torch.finfo().tiny)
        return scale, min(max(round(-lo / scale), 0), q_max)

    def _nothing(self) -> ValueError:
        return ValueError(message(type(self).__name__, "range", "no finite values", "at least one, to observe"))


def observer(name: ObserverName, bits: int, symmetric: bool) -> Observer:
    """The observer called "minmax", "percentile" (99.9), "mse" or "moving_average" (0.9), for integers of this kind."""
    if name == "mse":
        return MseObserver(bits, symmetric)
    return {"minmax": MinMaxObserver, "percentile": PercentileObserver, "moving_average": MovingAverageObserver}[name]()


class MinMaxObserver(Observer):
    """From the smallest to the largest value."""

    def __init__(self) -> None:
        super().__init__()
        self._lo, self._hi = float("inf"), -float("inf")

    def _add(self, values: torch.Tensor) -> None:
        self._lo, self._hi = min(self._lo, float(values.min())), max(self._hi, float(values.max()))

    def range(self) -> tuple[float, float]:
        if self._lo > self._hi:
            raise self._nothing()
        return min(self._lo, 0.0), max(self._hi, 0.0)


class MovingAverageObserver(Observer):
    """The smallest and the largest value of each batch, averaged: `m = momentum · m + (1 - momentum) · batch`; Jacob et
    al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv
    1712.05877, section 3.1. One batch with an outlier moves it little.

    Args:
        momentum: 0 … 1.
    """

    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(message("MovingAverageObserver", "momentum", momentum, "0 to below 1"))
        self._momentum = momentum
        self._range: tuple[float, float] | None = None

    def _add(self, values: torch.Tensor) -> None:
        new, m = (float(values.min()), float(values.max())), self._momentum
        old = new if self._range is None else self._range
        self._range = (m * old[0] + (1 - m) * new[0], m * old[1] + (1 - m) * new[1])

    def range(self) -> tuple[float, float]:
        if self._range is None:
            raise self._nothing()
        return min(self._range[0], 0.0), max(self._range[1], 0.0)


class _Histogram(Observer):
    """Counts in 4096 bins over ±limit; where a value lies beyond it, the limit doubles and two bins become one."""

    def __init__(self) -> None:
        super().__init__()
        self._limit = 0.0
        self._counts = torch.zeros(_BINS, dtype=torch.float64)

    def _add(self, values: torch.Tensor) -> None:
        largest = float(values.abs().max())
        if self._limit == 0 and largest > 0:
            # What was counted until here was zero, and lies in the middle whatever the limit.
            self._limit = largest
        while self._limit and largest > self._limit:
            merged = self._counts.view(-1, 2).sum(1)
            self._counts = torch.nn.functional.pad(merged, (_BINS // 4, _BINS // 4))
            self._limit *= 2
        limit = self._limit or 1.0
        self._counts += torch.histc(values.cpu(), _BINS, -limit, limit).double()

    @property
    def _centres(self) -> torch.Tensor:
        limit = self._limit
        return (torch.arange(_BINS, dtype=torch.float64) + 0.5) * (2 * limit / _BINS) - limit


class PercentileObserver(_Histogram):
    """The range that leaves out so many values at each end.

    Args:
        percentile: what stays below the upper end and above the lower one, in percent; accurate to a bin, 1/2048 of the
            largest magnitude (after the range grew, up to twice that).
    """

    def __init__(self, percentile: float = 99.9) -> None:
        super().__init__()
        if not 50 < percentile <= 100:
            raise ValueError(message("PercentileObserver", "percentile", percentile, "above 50, at most 100"))
        self._part = percentile / 100

    def range(self) -> tuple[float, float]:
        below = self._counts.cumsum(0)
        if not below[-1]:
            raise self._nothing()
        if not self._limit:  # nothing but zeros, which lie in a bin that has a width
            return 0.0, 0.0
        width = 2 * self._limit / _BINS
        wanted = self._part * below[-1]
        hi = float(self._centres[int((below >= wanted).nonzero()[0])]) + width / 2
        above = self._counts.flip(0).cumsum(0)
        lo = -(float(self._centres[int((above >= wanted).nonzero()[0])]) + width / 2)
        # By symmetry of the bins, counting from above gives the lower end with the other sign.
        return min(lo, 0.0), max(hi, 0.0)


class MseObserver(_Histogram):
    """The part of the whole range, in hundredths, whose integers have the smallest squared error; Nagel et al., "A
    White Paper on Neural Network Quantization", arXiv 2106.08295, section 3.1.

    Args:
        bits, symmetric: of these integers.
    """

    def __init__(self, bits: int = 8, symmetric: bool = True) -> None:
        super().__init__()
        self._bits, self._symmetric = bits, symmetric

    def range(self) -> tuple[float, float]:
        used = self._counts.nonzero()[:, 0]
        if not len(used):
            raise self._nothing()
        if not self._limit:
            return 0.0, 0.0
        x, counts = self._centres[used], self._counts[used]
        half = self._limit / _BINS
        lo, hi = min(float(x[0]) - half, 0.0), max(float(x[-1]) + half, 0.0)
        best, least = (lo, hi), float("inf")
        for i in range(_CANDIDATES, 0, -1):
            part = i / _CANDIDATES
            q_max = 2 ** (self._bits - 1) - 1 if self._symmetric else 2**self._bits - 1
            scale = (max(-lo, hi) if self._symmetric else hi - lo) * part / q_max
            zero = 0.0 if self._symmetric else round(-lo * part / scale)
            low = -q_max if self._symmetric else 0
            q = (torch.round(x / scale) + zero).clamp(low, q_max)
            error = float((((q - zero) * scale - x).square() * counts).sum())
            if error < least:
                best, least = (lo * part, hi * part), error
        return best
