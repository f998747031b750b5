"""Tiles of the int8 linear layer, by number of tokens and GPU."""

from __future__ import annotations

from dataclasses import replace

from .tiles import PROCESSORS, TileConfig, TileTable

#: Up to here linear_narrow runs: one tile of tokens, the weight is read once.
NARROW_TOKENS = 32
#: Fewer programs than this read the weight too slowly: K is split.
FEW = 96

_MIDDLE = TileConfig(64, 64, 128, 4, 4)
#: 37 % of its loop's instructions multiply on 8.x; with 128 products a step 32 %.
_LONG = TileConfig(64, 64, 256, 4, 3)

# sm_90: measured on an H100, narrow at 1 and 16 tokens, 4096 and 11008 channels, the others at 128, 2048 and 8192
# tokens, docs/design/010. 128 registers leave room for two programs on a multiprocessor: a float32 bias took 150 and,
# with one program, 34 to 43 % more time. Others: not measured, by what the compiled loop issues.
TILES = TileTable(
    "int8_linear",
    {
        "wide": TileConfig(128, 128, 64, 8, 3),
        "middle": _LONG,
        "few columns": _LONG,
        "narrow 16": TileConfig(16, 32, 256, 4, 6),
        "narrow 32": TileConfig(32, 32, 256, 4, 6),
        "narrow 16, many columns": TileConfig(16, 32, 256, 4, 4),
        "narrow 32, many columns": TileConfig(32, 32, 256, 4, 4),
    },
    sm_90={
        "wide": TileConfig(128, 128, 128, 8, 3, registers=128),
        "middle": _MIDDLE,
        "few columns": TileConfig(64, 32, 128, 4, 8),  # many small pieces in flight: the weight comes from memory
    },
    # 64 KiB of shared memory
    gfx942={"middle": _MIDDLE, "few columns": _MIDDLE, "narrow 32": TileConfig(32, 32, 256, 4, 4)},
)


def int8_linear_tile(capability: int, m: int, n: int, k: int) -> TileConfig:
    """For M tokens on compute capability 80, 86, …. Up to `NARROW_TOKENS` the tile holds them all, and K is split where
    tiles are few: by rule, slower where programs suffice."""
    if m <= NARROW_TOKENS:
        tiles, split = -(-n // 32), 1
        while tiles * split < FEW and k >= 512 * split and split < 16:
            split *= 2
        many = ", many columns" if tiles > PROCESSORS else ""
        return replace(TILES.tile(capability, f"narrow {16 if m <= 16 else 32}{many}"), split=split)
    if -(-m // 128) * -(-n // 128) >= PROCESSORS and m > 128:
        return TILES.tile(capability, "wide")
    return TILES.tile(capability, "few columns" if -(-n // 64) < PROCESSORS and m <= 128 else "middle")
