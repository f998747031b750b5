"""Tile sizes of the int8 linear layer, by number of tokens and GPU."""

from __future__ import annotations

from dataclasses import dataclass

#: Up to here linear_narrow runs: one tile of tokens, the weight is read once.
NARROW_TOKENS = 32
#: Multiprocessors of an H100; a launch should have about one program for each.
PROCESSORS = 132
#: Fewer programs than this read the weight too slowly: K is split.
FEW = 96


@dataclass(frozen=True)
class WideTiles:
    """Tokens, channels and products of a tile; warps; tiles in flight; how many rows of tiles share a run over the
    weight."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    group: int = 8
    registers: int | None = None


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
    """Measured on an H100 at 128, 2048 and 8192 tokens, docs/design/010; other GPUs: not measured."""
    hopper = 90 <= capability < 100
    if -(-m // 128) * -(-n // 128) >= PROCESSORS and m > 128:
        # 128 registers leave room for two programs on a multiprocessor: a float32 bias took 150 and, with one program,
        # 34 to 43 % more time. What spills for it does so once, after the loop.
        return WideTiles(128, 128, 128, 8, 3, registers=128) if hopper else WideTiles(128, 128, 64, 8, 3)
    if hopper and -(-n // 64) < PROCESSORS and m <= 128:
        return WideTiles(64, 32, 128, 4, 8)  # many small pieces in flight: the weight comes from memory
    return WideTiles(64, 64, 128, 4, 4)


def narrow_tiles(capability: int, m: int, n: int, k: int) -> NarrowTiles:
    """Measured on an H100 at 1 and 16 tokens, 4096 and 11008 channels; split K: by rule, slower where programs
    suffice."""
    tiles = -(-n // 32)
    split_k = 1
    while tiles * split_k < FEW and k >= 512 * split_k and split_k < 16:
        split_k *= 2
    return NarrowTiles(16 if m <= 16 else 32, 32, 256, 4, 6 if tiles <= PROCESSORS else 4, split_k)
