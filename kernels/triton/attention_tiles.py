"""Tiles of the attention kernel, by head size, length and GPU.

block_m: queries a program holds. block_n: keys that a step of its loop takes, and that share a scale. warps: 4 make a
warpgroup, which takes 64 queries. stages: blocks of K and V in flight.
"""

from __future__ import annotations

from . import autotune
from .tiles import TileConfig, TileTable

#: Up to here a smaller tile is faster where heads have 64: the diagonal and the last wave are less of the work.
SHORT = 2048


def attention_tile(
    block_m: int, block_n: int, warps: int, stages: int, registers: int | None = None, ones: bool = False
) -> TileConfig:
    """A step of the loop has no third axis."""
    return TileConfig(block_m, block_n, 0, warps, stages, registers=registers, ones=ones)


TILES = TileTable(
    "attention",
    # Not measured, chosen by what the compiled loop issues (docs/gpu.md), without spills. Others than Hopper: shared
    # memory of 99 KiB (8.6, 8.9) suffices. A tile should have as many rows as keys, and as the head has channels: only
    # then does Triton give each warp rows of its own in both products; else warps exchange P through shared memory, a
    # third of the loop for 64 rows and a head of 128. Of two stages one is filled only after the other was used up:
    # three, where no second program hides that. With a mask tensor, a tile of it is in flight and in registers too.
    {
        "short": attention_tile(64, 64, 4, 2, ones=True),
        "head of 64": attention_tile(128, 128, 8, 3, ones=True),
        "head of 128": attention_tile(128, 64, 8, 3, ones=True),
        "head of 256": attention_tile(64, 32, 8, 3, ones=True),
        # Sums of the second product are in registers beside the output.
        "head of 128, values in int8": attention_tile(128, 64, 8, 3),
        "head of 256, values in int8": attention_tile(64, 32, 8, 3, ones=True),
        "mask, head of 64": attention_tile(64, 32, 4, 2),
        "mask": attention_tile(64, 32, 8, 2),
        "sequences, head of 128": attention_tile(128, 64, 8, 3, ones=True),
        # Two bytes of Q stay in registers, and K takes twice the shared memory.
        "12 bits, head of 64": attention_tile(128, 64, 8, 3, ones=True),
        "12 bits, head of 128": attention_tile(128, 64, 8, 3, ones=True),
        "12 bits, head of 256": attention_tile(64, 32, 8, 2, ones=True),
        "12 bits, mask, head of 256": attention_tile(32, 32, 8, 2),
    },
    # Measured on an H100, docs/design/010, without `ones`. With 128 registers two programs share a multiprocessor, and
    # one multiplies while the other is in its softmax: 632 against 465 TOPS; `ones` would spill there.
    sm_90={
        "short": attention_tile(64, 64, 4, 3, ones=True),
        "head of 64": attention_tile(128, 128, 4, 3, ones=True),
        "head of 128": attention_tile(128, 64, 8, 3, registers=128),
        "head of 256": attention_tile(128, 64, 8, 2, ones=True),
        "head of 128, values in int8": attention_tile(128, 64, 8, 3, ones=True),
        # Not measured. What is read of offsets takes registers: with 128 the tile of the dense kernel spills.
        "sequences, head of 128": attention_tile(128, 32, 4, 3, ones=True),
        # Not measured. Eight warps instead of four at a head of 64, and no bound of registers: either would spill.
        "12 bits, head of 64": attention_tile(128, 128, 8, 3, ones=True),
        "12 bits, head of 128": attention_tile(128, 64, 8, 3, ones=True),
        "12 bits, head of 256": attention_tile(128, 32, 8, 2, ones=True),
        "12 bits, mask, head of 256": attention_tile(64, 32, 8, 2),
    },
    # 64 KiB of shared memory: two stages.
    gfx942={
        "head of 64": attention_tile(128, 128, 8, 2, ones=True),
        "head of 128": attention_tile(128, 64, 8, 2, ones=True),
        "head of 256": attention_tile(64, 32, 8, 2, ones=True),
        "head of 128, values in int8": attention_tile(128, 64, 8, 2),
        "head of 256, values in int8": attention_tile(64, 32, 8, 2, ones=True),
        "sequences, head of 128": attention_tile(128, 64, 8, 2, ones=True),
        "12 bits, head of 64": attention_tile(128, 64, 8, 2, ones=True),
        "12 bits, head of 128": attention_tile(128, 64, 8, 2, ones=True),
    },
)


def tiles(
    capability: int, head: int, sq: int, masked: bool, value_bits: int = 16, bits: int = 8, sequences: bool = False
) -> TileConfig:
    """For a head padded to `head`, `sq` queries and a mask tensor or none, on compute capability 80, 86, 90, …

    sequences: laid end to end.
    """
    size = "head of 64" if head <= 64 else "head of 128" if head <= 128 else "head of 256"
    role = size
    if masked:
        role = "mask, head of 64" if head <= 64 else "mask"
        if bits == 12 and head > 128:
            role = f"12 bits, mask, {size}"
    elif value_bits == 8 and head > 64:
        role = f"{size}, values in int8"
    elif head <= 128 and sq <= (SHORT if head <= 64 else 64):
        role = "short"
    elif bits == 12:
        role = f"12 bits, {size}"
    elif sequences and 64 < head <= 128:
        role = f"sequences, {size}"
    return TILES.tile(capability, role)


def candidates(stored: TileConfig) -> list[TileConfig]:
    """What `autotune` measures beside the stored tile."""
    return autotune.neighbours(
        stored, block_m=(64, 128), block_n=(32, 64, 128), warps=(4, 8), stages=(2, 3), ones=(False, True)
    )
