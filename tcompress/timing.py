"""Compares running times on a machine that others use too."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median of `calls` calls, and the quartiles around it."""

    median: float
    quartiles: tuple[float, float]
    calls: int


def alternate(
    functions: Sequence[Callable[[], Any]], seconds: float = 1.0, *, warm_up: int = 3, min_calls: int = 5
) -> list[Timing]:
    """Times functions by calling them in turn: A, B, A, B, …; a slow spell of the machine then meets all of them.

    Args:
        functions: called without arguments.
        seconds: how long the whole measurement lasts, after `warm_up` calls of each.
        min_calls: at least so many calls of each, however long they take.
    """
    for function in functions:
        for _ in range(warm_up):
            function()
    samples: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(samples[0]) < min_calls:
        for function, times in zip(functions, samples, strict=True):
            start = time.perf_counter()
            function()
            times.append(time.perf_counter() - start)
    return [_timing(times) for times in samples]


def _timing(times: list[float]) -> Timing:
    first, median, third = statistics.quantiles(times, n=4)
    return Timing(median, (first, third), len(times))
