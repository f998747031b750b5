"""Tile sizes of the attention kernel, by head size and GPU."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tiles:
    """Of one launch.

    block_m: queries a program holds. block_n: keys a step of its loop takes, and keys that share a scale.
    warps: 4 make a warpgroup, which takes 64 queries. stages: blocks of K and V in flight.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    ahead: bool = False
    registers: int | None = None


#: By compute capability (this or higher) and padded head size (up to). 9.0 measured (docs/design/010); the rest chosen so that
#: nothing spills: the sums of a query's output take block_m · Dp / (32 · warps) registers a thread.
_TABLE: dict[int, dict[int, Tiles]] = {
    90: {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(128, 64, 8, 2)},
    80: {64: Tiles(128, 64, 4, 3), 128: Tiles(128, 64, 8, 3), 256: Tiles(64, 64, 8, 2)},
}


def tiles(capability: int, head: int, sq: int) -> Tiles:
    """For a head padded to `head` and `sq` queries, on compute capability 80, 86, 90, …"""
    by_head = _TABLE[90 if 90 <= capability < 100 else 80]
    chosen = next(t for size, t in sorted(by_head.items()) if head <= size)
    if sq <= 64 and chosen.block_m > 64:  # a short sequence: half the tile, half the warps
        return Tiles(64, chosen.block_n, 4, chosen.stages)
    return chosen
