"""Tile sizes of the attention kernel, by head size, length and GPU."""

from __future__ import annotations

from dataclasses import dataclass

from . import autotune


@dataclass(frozen=True)
class Tiles:
    """Of one launch.

    block_m: queries a program holds. block_n: keys that a step of its loop takes, and that share a scale.
    warps: 4 make a warpgroup, which takes 64 queries. stages: blocks of K and V in flight.
    registers: a bound for each thread, so that two programs fit a multiprocessor; None for the compiler's choice.
    ones: the sums of P by the matrix unit (attention_blocks), for two more registers.
    """

    block_m: int
    block_n: int
    warps: int
    stages: int
    registers: int | None = None
    ones: bool = False


#: Up to here a smaller tile is faster where heads have 64: the diagonal and the last wave are less of the work.
SHORT = 2048

# Hopper: measured on an H100, docs/design/010, without `ones`. With 128 registers two programs share a multiprocessor,
# and one multiplies while the other is in its softmax: 632 against 465 TOPS; `ones` would spill there.
_HOPPER_64_SHORT = Tiles(64, 64, 4, 3, ones=True)
_HOPPER_64 = Tiles(128, 128, 4, 3, ones=True)
_HOPPER_128 = Tiles(128, 64, 8, 3, registers=128)
_HOPPER_256 = Tiles(128, 64, 8, 2, ones=True)

# Not measured, chosen by what the compiled loop issues (docs/gpu.md), without spills. Others than Hopper: shared
# memory of 99 KiB (8.6, 8.9) suffices. A tile should have as many rows as keys, and as the head has channels: only then
# does Triton give each warp rows of its own in both products; else warps exchange P through shared memory, a third of
# the loop for 64 rows and a head of 128. Of two stages one is filled only after the other was used up: three, where no
# second program hides that. With a mask tensor, a tile of it is in flight and in registers too.
_ANY_SHORT = Tiles(64, 64, 4, 2, ones=True)
_ANY_64 = Tiles(128, 128, 8, 3, ones=True)
_ANY_128 = Tiles(128, 64, 8, 3, ones=True)
_ANY_256 = Tiles(64, 32, 8, 3, ones=True)
# With values in int8 the sums of the second product are in registers beside the output.
_HOPPER_INT8_128 = Tiles(128, 64, 8, 3, ones=True)
_ANY_INT8_128 = Tiles(128, 64, 8, 3)
_MASK_64 = Tiles(64, 32, 4, 2)
_MASK = Tiles(64, 32, 8, 2)


def tiles(capability: int, head: int, sq: int, masked: bool, value_bits: int = 16) -> Tiles:
    """For a head padded to `head`, `sq` queries and a mask tensor or none, on compute capability 80, 86, 90, …"""
    hopper = 90 <= capability < 100
    if masked:
        return _MASK_64 if head <= 64 else _MASK
    if value_bits == 8 and head > 64:
        return _ANY_256 if head > 128 else _HOPPER_INT8_128 if hopper else _ANY_INT8_128
    if not hopper:
        if head <= 64:
            return _ANY_SHORT if sq <= SHORT else _ANY_64
        if head <= 128:
            return _ANY_SHORT if sq <= 64 else _ANY_128
        return _ANY_256
    if head <= 64:
        return _HOPPER_64_SHORT if sq <= SHORT else _HOPPER_64
    if head <= 128:
        return _HOPPER_64_SHORT if sq <= 64 else _HOPPER_128
    return _HOPPER_256


def candidates(stored: Tiles) -> list[Tiles]:
    """What `autotune` measures beside the stored tile."""
    return autotune.neighbours(
        stored, block_m=(64, 128), block_n=(32, 64, 128), warps=(4, 8), stages=(2, 3), ones=(False, True)
    )
