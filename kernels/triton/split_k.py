"""One sum over K by several programs, put together in the order of their parts: the same result in every run.

   PARTIAL [tiles, SPLIT, BLOCK_M, BLOCK_N]      what each program of a tile found
   DONE    [tiles] int32, zeros                  how many have

1. Each program stores its part, then counts itself.
2. The one that finds all others counted reads all parts, in order, and goes on; the others end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def sum_of_splits(acc, PARTIAL, DONE, tile, split, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(the whole sum, whether this program is the one that has it)."""
    cells = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    first = PARTIAL + tile.to(tl.int64) * (SPLIT * BLOCK_M * BLOCK_N)
    tl.store(first + split * (BLOCK_M * BLOCK_N) + cells, acc)
    # every thread's part comes before the count of one
    tl.debug_barrier()
    last = tl.atomic_add(DONE + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        acc = tl.zeros_like(acc)
        for part in range(SPLIT):
            # past the first-level cache, which may hold what was there before
            acc += tl.load(first + part * (BLOCK_M * BLOCK_N) + cells, cache_modifier=".cg")
    return acc, last


def workspace(
    tiles: int, split: int, cells: int, dtype: torch.dtype, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """PARTIAL and DONE for tiles of so many cells."""
    return (
        torch.empty(tiles * split * cells, dtype=dtype, device=device),
        torch.zeros(tiles, dtype=torch.int32, device=device),
    )
