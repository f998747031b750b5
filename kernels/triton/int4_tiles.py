"""Tiles of the int4 linear layer, by number of tokens, group size and type of the products."""

from __future__ import annotations

from dataclasses import replace

import torch

from .reasons import LEAST_GROUP
from .tiles import PROCESSORS, TileConfig, TileTable

#: Up to here int4_narrow runs: one tile of tokens.
NARROW_TOKENS = 32
#: Products that a split should have at least.
LEAST_PART = 512

# By rule, chosen so that nothing spills. Measured on an H100 as they are (docs/design/012), and no others. For one
# token 16 rows too: a third of the time of products of vectors.
TILES = TileTable(
    "int4_linear",
    {
        "narrow 16": TileConfig(16, 32, 128, 4, 4),
        "narrow 32": TileConfig(32, 32, 128, 4, 4),
        "narrow 16, float32": TileConfig(16, 16, 64, 4, 4),
        "narrow 32, float32": TileConfig(32, 16, 64, 4, 4),
        "wide": TileConfig(128, 64, 64, 8, 3),
        "wide, int8": TileConfig(128, 64, 128, 8, 3),
        "wide, float32": TileConfig(32, 64, 32, 4, 2),
        "middle": TileConfig(64, 64, 64, 4, 3),
        "middle, int8": TileConfig(64, 64, 128, 4, 3),
    },
)


def int4_tile(capability: int, m: int, n: int, k: int, group_size: int, dtype: torch.dtype) -> TileConfig:
    """`dtype`: of the products, int8 or that of x. A step of K lies within a group."""
    longest = LEAST_GROUP if group_size < k else 4096
    while longest < group_size:
        longest *= 2
    floats = ", float32" if dtype == torch.float32 else ""
    if m <= NARROW_TOKENS:
        tile = TILES.tile(capability, f"narrow {16 if m <= 16 else 32}{floats}")
        tiles, split = -(-n // tile.block_n), 1
        while tiles * split < PROCESSORS and k >= LEAST_PART * 2 * split and split < 16:
            split *= 2
        tile = replace(tile, split=split)
    elif floats:
        tile = TILES.tile(capability, "wide, float32")
    else:
        wide = -(-m // 128) * -(-n // 128) >= PROCESSORS and m > 128
        tile = TILES.tile(capability, ("wide" if wide else "middle") + (", int8" if dtype == torch.int8 else ""))
    return replace(tile, block_k=min(tile.block_k, longest))
