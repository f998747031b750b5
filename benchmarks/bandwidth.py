"""Measures how fast memory is read: the bound of a layer that gets one token.

python benchmarks/bandwidth.py
"""

from __future__ import annotations

import statistics
import time

import torch


def read_bandwidth(nbytes: int = 1 << 30, repeats: int = 5) -> float:
    """GB/s (10^9 bytes a second) that `torch.sum` over float32 reads, the median of `repeats`, on torch's threads."""
    data = torch.ones(nbytes // 4)
    data.sum()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        data.sum()
        seconds.append(time.perf_counter() - start)
    return data.nbytes / statistics.median(seconds) / 1e9


if __name__ == "__main__":
    print(f"{read_bandwidth():.1f} GB/s read, {torch.get_num_threads()} threads")
