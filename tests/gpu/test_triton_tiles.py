"""The tables of tiles: names, and which table a GPU reads."""

from __future__ import annotations

import pytest
import torch
import triton_cases

triton_cases.require()

from tcompress.kernels.triton import (  # noqa: E402, F401  each has a table
    attention,
    block_sparse_linear,
    decode,
    int4_linear,
    int4_sparse_linear,
    linear,
    numbers,
    tiles,
    two_four_linear,
)
from tcompress.kernels.triton.tiles import TABLES, TileConfig, TileTable, architecture  # noqa: E402

KERNELS = {
    "int8_linear", "int4_linear", "two_four_linear", "block_sparse_linear", "int4_sparse_linear", "attention", "decode",
}  # fmt: skip


def test_every_launcher_that_chooses_has_a_table():
    assert set(TABLES) >= KERNELS


@pytest.mark.parametrize("kernel", sorted(KERNELS))
def test_a_name_means_one_tile(kernel):
    named: dict[str, TileConfig] = {}
    for architecture_name, role, tile in TABLES[kernel]:
        assert tile.name.startswith(f"{kernel}/{architecture_name}/"), role
        assert named.setdefault(tile.name, tile) == tile
        sizes = (tile.block_m, tile.block_n, tile.block_k or 16, tile.warps)
        assert all(size & (size - 1) == 0 for size in sizes), tile.name
    assert {name.split("/")[1] for name in named} == set(tiles.ARCHITECTURES.values())


def test_names():
    tile = TileConfig(128, 64, 0, 8, 3, 4, registers=128, kernel="attention", architecture="sm_90")
    assert tile.name == "attention/sm_90/128x64-8w3s-k4-r128"
    assert TABLES["int8_linear"].tile(90, "wide").name == "int8_linear/sm_90/128x128x128-8w3s-r128"


@pytest.mark.parametrize(
    ("capability", "name"),
    [(80, "sm_80"), (86, "sm_86"), (87, "sm_86"), (90, "sm_90"), (103, "sm_100"), (121, "sm_120"), (942, "gfx942")],
)
def test_a_gpu_without_a_table_reads_that_of_the_one_before(capability, name):
    assert architecture(capability) == name
    assert TABLES["attention"].tile(capability, "short").architecture == name


def test_amd_has_its_own(monkeypatch):
    class OnGPU:
        is_cuda, device = True, 0

    monkeypatch.setattr(torch.version, "hip", "6.2")
    assert architecture(numbers.capability(OnGPU())) == "gfx942"
    assert numbers.capability(torch.empty(1)) == 80


def test_a_table_that_is_wrong_is_refused():
    for tables in ({"sm_91": {}}, {"sm_90": {"other": TileConfig(1, 1)}}):
        with pytest.raises(ValueError, match="TileTable: odd: got"):
            TileTable("odd", {"wide": TileConfig(16, 16)}, **tables)
    with pytest.raises(ValueError, match="a second table"):
        TileTable("attention", {})
    assert "odd" not in TABLES
