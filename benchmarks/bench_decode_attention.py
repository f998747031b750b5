"""Attention of one new token over a cache. `python benchmarks/run.py --op decode_attention` (make bench) runs each peer
in a process of its own; plain `pytest benchmarks/bench_decode_attention.py` runs torch's and ours in one."""

from __future__ import annotations

from typing import Any

from shapes import AttentionShape
from timed import bench

OP = "decode_attention"


def test_decode_attention(benchmark: Any, shape: AttentionShape, peer: str) -> None:
    bench(benchmark, OP, shape, peer)
