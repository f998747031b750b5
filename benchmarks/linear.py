"""Times one linear layer and checks its result: the body of the benchmarks of all linear ops."""

from __future__ import annotations

import time
from typing import Any

import clock
import pytest
import torch
from peer import CannotRun
from peers import OPS
from shapes import LinearShape


def bench(benchmark: Any, op: str, shape: LinearShape, peer: str) -> None:
    """Times `peer` at `shape`; skips with the reason where it cannot run.

    `extra_info` gets: relative_error (against float64), ghz (right after the timing, all threads busy; None where it
    cannot be measured), macs_per_cycle (a core), weight_gb_s (10^9 bytes of packed weight and scales read a second),
    and what the process ran on.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.m, shape.k, generator=generator)
    w = torch.randn(shape.n, shape.k, generator=generator) / shape.k**0.5
    b = torch.randn(shape.n, generator=generator)
    benchmark.group = f"{op}/{shape}/float32"
    layer = OPS[op][peer]
    try:
        linear = layer.build(x, w, b)
    except CannotRun as reason:
        pytest.skip(str(reason))
    with torch.inference_mode():
        expected = x.double() @ w.double().t() + b.double()
        error = float((linear().double() - expected).norm() / expected.norm())
        assert error < layer.tolerance, "a wrong fast kernel must not make it into a table"
        del expected
        benchmark.pedantic(linear, rounds=_rounds(linear), warmup_rounds=3)
    threads, ghz = torch.get_num_threads(), clock.measure(torch.get_num_threads())
    seconds = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "peer": peer,
        "shape": str(shape),
        "relative_error": error,
        "ghz": ghz,
        "macs_per_cycle": None if ghz is None else shape.macs / (seconds * ghz * 1e9 * threads),
        "weight_gb_s": layer.weight_bytes(shape.n, shape.k) / seconds / 1e9,
        "threads": threads,
        "torch": torch.__version__,
        "path": _path(),
    }


def _rounds(linear: Any) -> int:
    """Calls that take about half a second, within bounds."""
    linear()
    start = time.perf_counter()
    linear()
    return max(5, min(2000, int(0.5 / (time.perf_counter() - start))))


def _path() -> str:
    """The instruction set that our kernels take here."""
    from tcompress.backend import cpu_path

    return cpu_path() or "reference"
