"""Tile sizes of the int8 linear layer, by number of tokens and GPU."""

from __future__ import annotations

from dataclasses import dataclass

#: Up to here linear_narrow runs: one tile of tokens, the weight is read once.
NARROW_TOKENS = 64
#: Programs that a launch should have at least: a few for each multiprocessor.
PROGRAMS = 264


@dataclass(frozen=True)
class WideTiles:
    """Tokens, channels and products of a tile; warps; tiles in flight; how many rows of tiles share a run over the weight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8


@dataclass(frozen=True)
class NarrowTiles:
    """As above; split_k: programs that share a tile's K."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    split_k: int


def wide_tiles(capability: int, m: int, n: int, k: int) -> WideTiles:
    if 90 <= capability < 100:  # wgmma: at least 64 tokens a warpgroup
        if m <= 128 or n * m <= 132 * 128 * 128:
            return WideTiles(64, 128, 128, 4, 4)
        return WideTiles(128, 256, 128, 8, 3)
    if m <= 128:
        return WideTiles(64, 128, 64, 4, 4)
    return WideTiles(128, 128, 64, 4, 3)


def narrow_tiles(capability: int, m: int, n: int, k: int) -> NarrowTiles:
    block_m = 16 if m <= 16 else 32 if m <= 32 else 64
    block_n = 32 if n >= 32 * PROGRAMS or m > 16 else 16
    block_k = 256 if block_m <= 32 else 128
    tiles = -(-n // block_n)
    split_k = 1
    while tiles * split_k * 2 <= 2 * PROGRAMS and k >= 4 * block_k * split_k and split_k < 16:
        split_k *= 2
    return NarrowTiles(block_m, block_n, block_k, 4, 4, split_k)
