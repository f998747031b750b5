"""int8 linear layers. `python benchmarks/run.py --op int8_linear` (make bench) runs each peer in a process of its own;
plain `pytest benchmarks/bench_int8_linear.py` runs torch's and ours in one."""

from __future__ import annotations

from typing import Any

from shapes import LinearShape
from timed import bench

OP = "int8_linear"


def test_int8_linear(benchmark: Any, shape: LinearShape, peer: str) -> None:
    bench(benchmark, OP, shape, peer)
