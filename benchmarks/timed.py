"""Times one peer at one shape and checks its result: the body of all benchmarks."""

from __future__ import annotations

import time
from typing import Any

import clock
import pytest
import torch
from peer import CannotRun
from peers import OPS
from problem import Shape


def bench(benchmark: Any, op: str, shape: Shape, peer: str) -> None:
    """Times `peer` at `shape`; skips with the reason where it cannot run.

    `extra_info` gets: relative_error (against float64) and cosine (None where the op has none), macs, ghz (right after
    the timing, all threads busy; None where it cannot be measured), macs_per_cycle (a core), read_gb_s (10^9 bytes of
    packed weight, or of K and V, a second), seconds (of a call, the median), and what the process ran on.

    A call with an attribute `seconds` was timed where it runs, in another process.
    """
    problem, compared = OPS[op].problem, OPS[op].peers[peer]
    inputs = problem.inputs(shape)
    benchmark.group = f"{op}/{shape}/float32"
    try:
        call = compared.build(*inputs)
    except CannotRun as reason:
        pytest.skip(str(reason))
    with torch.inference_mode():
        errors = problem.errors(call(), problem.expected(*inputs))
        error = errors["relative_error"]
        assert error < compared.tolerance, "a wrong fast kernel must not make it into a table"
        elsewhere = getattr(call, "seconds", None)
        benchmark.pedantic(call, rounds=_rounds(call) if elsewhere is None else 1, warmup_rounds=3)
    threads, ghz = torch.get_num_threads(), clock.measure(torch.get_num_threads())
    seconds = benchmark.stats.stats.median if elsewhere is None else elsewhere
    benchmark.extra_info |= {
        "peer": peer,
        "shape": str(shape),
        "macs": shape.macs,
        "seconds": seconds,
        "cosine": None,
        **errors,
        "ghz": ghz,
        "macs_per_cycle": None if ghz is None else shape.macs / (seconds * ghz * 1e9 * threads),
        "read_gb_s": compared.read_bytes(shape) / seconds / 1e9,
        "threads": threads,
        "torch": torch.__version__,
        "path": _path(),
    }


def _rounds(call: Any) -> int:
    """Calls that take about half a second, within bounds."""
    call()
    start = time.perf_counter()
    call()
    return max(5, min(2000, int(0.5 / (time.perf_counter() - start))))


def _path() -> str:
    """The instruction set that our kernels take here."""
    from tcompress.backend import cpu_path

    return cpu_path() or "reference"
