"""Linear layers with many zeros. `python benchmarks/run.py --op sparse_linear` (make bench) runs each peer in a process
of its own; plain `pytest benchmarks/bench_sparse_linear.py` runs torch's and ours in one."""

from __future__ import annotations

from typing import Any

from shapes import SparseShape
from timed import bench

OP = "sparse_linear"


def test_sparse_linear(benchmark: Any, shape: SparseShape, peer: str) -> None:
    bench(benchmark, OP, shape, peer)
