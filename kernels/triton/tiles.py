"""The sizes that a launch is compiled with."""

from __future__ import annotations

from dataclasses import dataclass

#: Multiprocessors of an H100; a launch should have about one program for each.
PROCESSORS = 132


@dataclass(frozen=True)
class TileConfig:
    """Sizes of one launch; what a kernel has no use for it ignores.

    Attributes:
        block_m: rows (tokens, queries) of a tile.
        block_n: columns of it: channels, or keys.
        block_k: products that a step of its loop sums; 0 where the loop has no such axis.
        warps: 4 make a warpgroup.
        stages: steps whose loads are in flight.
        split: programs that share the loop of one tile.
        group: rows of tiles that run through the columns together, for the second-level cache.
        registers: a bound for each thread, so that several programs fit a multiprocessor; None: the compiler's choice.
        name: as tables and the autotune cache call it.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    warps: int = 4
    stages: int = 2
    split: int = 1
    group: int = 8
    registers: int | None = None
    name: str = ""
