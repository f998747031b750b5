"""The sizes that a launch is compiled with: by name, in a table for each kernel, by architecture.

    int8_linear/sm_90/128x128x128-8w3s-r128      kernel / architecture / rows x columns x products - warps, stages
                                                 -k4: 4 programs share a sum;  -r128: at most 128 registers a thread;
                                                 -ones: sums by the matrix unit

A launcher has a rule that picks a role of its table ("wide", "narrow 16") by the sizes of its tensors, and may split
the sum of the tile that it finds there. The tests compile every tile of every table for its architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

#: Multiprocessors of an H100; a launch should have about one program for each.
PROCESSORS = 132
#: By what `numbers.capability` says.
ARCHITECTURES = {
    80: "sm_80", 86: "sm_86", 89: "sm_89", 90: "sm_90", 100: "sm_100", 120: "sm_120", 942: "gfx942",
}  # fmt: skip
AMD = 942


def architecture(capability: int) -> str:
    """The table's name for a GPU: its own, or that of the one before (8.7: sm_86)."""
    if capability in ARCHITECTURES:
        return ARCHITECTURES[capability]
    return ARCHITECTURES[max((c for c in ARCHITECTURES if c < capability and c != AMD), default=80)]


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
        ones: sums of P by the matrix unit (attention_blocks), for two more registers.
        kernel, architecture: of the table that it is from.
    """

    block_m: int
    block_n: int
    block_k: int = 0
    warps: int = 4
    stages: int = 2
    split: int = 1
    group: int = 8
    registers: int | None = None
    ones: bool = False
    kernel: str = ""
    architecture: str = ""

    @property
    def name(self) -> str:
        """As tables and the autotune cache call it."""
        sizes = "x".join(str(size) for size in (self.block_m, self.block_n, self.block_k) if size)
        split = f"-k{self.split}" if self.split > 1 else ""
        registers = f"-r{self.registers}" if self.registers else ""
        ones = "-ones" if self.ones else ""
        return f"{self.kernel}/{self.architecture}/{sizes}-{self.warps}w{self.stages}s{split}{registers}{ones}"


class TileTable:
    """The tiles of one kernel, by architecture and role.

    Args:
        kernel: as names begin.
        tiles: those of every architecture.
        others: `sm_90={…}`: those that differ there.
    """

    def __init__(self, kernel: str, tiles: Mapping[str, TileConfig], **others: Mapping[str, TileConfig]) -> None:
        unknown = set(others) - set(ARCHITECTURES.values())
        roles = {role for of_one in others.values() for role in of_one} - set(tiles)
        if unknown or roles or kernel in TABLES:
            raise ValueError(f"TileTable: {kernel}: got {unknown or roles or 'a second table'}, expected known names")
        self._tiles = {
            name: {role: replace(t, kernel=kernel, architecture=name) for role, t in (*tiles.items(), *of_one.items())}
            for name in ARCHITECTURES.values()
            for of_one in [others.get(name, {})]
        }
        TABLES[kernel] = self

    def tile(self, capability: int, role: str) -> TileConfig:
        """For a GPU of that compute capability."""
        return self._tiles[architecture(capability)][role]

    def __iter__(self) -> Iterator[tuple[str, str, TileConfig]]:
        """(architecture, role, tile)."""
        for name, tiles in self._tiles.items():
            for role, tile in tiles.items():
                yield name, role, tile


#: Every table of the launchers that are imported.
TABLES: dict[str, TileTable] = {}
