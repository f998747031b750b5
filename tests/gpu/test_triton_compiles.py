"""Every kernel of `kernels/triton` compiles for every GPU that it is shipped for, and every tile for every kind of GPU;
it fits the shared memory and uses the matrix unit. benchmarks/gpu_launches.py has the launches."""

from __future__ import annotations

import ast
import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import triton_cases

triton_cases.require_compiler()

sys.path.append(str(Path(__file__).parent.parent.parent / "benchmarks"))

import gpu_compile  # noqa: E402
import gpu_launches  # noqa: E402
import tcompress.kernels.triton  # noqa: E402
from aot import CompileError, Launch, compile_launch, launches  # noqa: E402
from tcompress.kernels.triton.tiles import TABLES, TileTable  # noqa: E402
from triton import JITFunction  # noqa: E402
from triton.runtime.interpreter import InterpretedFunction  # noqa: E402

#: Every tile is compiled for one GPU of each kind: 8.x, Hopper, data centre Blackwell, AMD.
EVERY = [80, 90, 100, "gfx942"]
#: The others have the tiles and, but for registers, the code of one of these: each kernel once.
LIKE_OTHERS = [86, 89, 120, "gfx90a"]
FOLDER = Path(tcompress.kernels.triton.__path__[0])
#: Bytes of shared memory that a program may have (CUDA C++ programming guide, table of compute capabilities; AMD: LDS).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx90a": 64, "gfx942": 64}
#: What a product of int8 looks like in the assembly. 9.0 has the asynchronous one; the tile of few tokens is too low
#: for it.
INT8_PRODUCT = {
    90: ("wgmma.mma_async.sync.aligned.m64n", "m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
    "gfx90a": ("v_mfma_i32_",), "gfx942": ("v_mfma_i32_",),
}  # fmt: skip


def specialized(x):
    if isinstance(x, torch.Tensor):
        return x.dtype, x.storage_offset() % 16
    return (x == 1, x % 16 == 0, abs(x) < 2**31) if type(x) is int else type(x)


def shipped(architecture: int | str, cases) -> list[Launch]:
    """What the launchers start on that GPU, once each that Triton compiles differently: of an integer it asks whether
    it is 1, a multiple of 16, and fits 32 bits."""
    found: list[Launch] = []
    with launches(architecture if isinstance(architecture, int) else 942, found.append):
        cases()
    described = {}
    for launch in found:
        values = [specialized(x) for x in launch.args]
        described[launch.module, launch.kernel, str(values), str(launch.kwargs)] = launch
    return list(described.values())


def defect(launch: Launch, architecture: int | str) -> str | None:
    name = f"{launch.kernel} {launch.kwargs}"
    try:
        compiled = compile_launch(launch, architecture)
    except CompileError as error:
        return f"{name}: {error}"
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    if not compiled.binary:
        return f"{name}: no machine code"
    # 8.6, 8.9 and 12.0 have the tiles of 8.0, and less memory
    if compiled.shared > 1024 * (SHARED[86] if architecture == 80 else SHARED[architecture]):
        return f"{name}: {compiled.shared} bytes of shared memory"
    if launch.kernel in ("attend", "linear_wide", "linear_narrow"):
        usual = ("m16n8k32.row.col.satfinite.s32.s8.s8.s32",)
        if not any(word in assembly for word in INT8_PRODUCT.get(architecture, usual)):
            return f"{name}: no matrix instruction of int8"
    return None


# for 8.0 and 8.9 others are compiled and run, in test_triton_emulated
@pytest.mark.parametrize("architecture", [90, "gfx942"])
def test_some_of_the_kernels(architecture):
    assert [d for launch in shipped(architecture, gpu_launches.few) if (d := defect(launch, architecture))] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [*EVERY, *LIKE_OTHERS])
def test_every_kernel(architecture):
    cases = gpu_launches.every if architecture in EVERY else gpu_launches.one_of_each
    # each starts a compiler's process; other processes of pytest, if there are any, do so too
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // beside))) as pool:
        found = pool.map(lambda launch: defect(launch, architecture), shipped(architecture, cases))
    assert [d for d in found if d] == []


def launched_in_source() -> set[tuple[str, str]]:
    """(module, kernel) of every `kernel[grid](…)` in `kernels/triton`."""
    found = set()
    for path in FOLDER.glob("*.py"):
        module = importlib.import_module(f"tcompress.kernels.triton.{path.stem}")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                kernel = getattr(module, getattr(node.func.value, "id", ""), None)
                if isinstance(kernel, JITFunction | InterpretedFunction):
                    found.add((kernel.fn.__module__, kernel.fn.__name__))
    return found


@pytest.mark.parametrize("cases", [gpu_launches.one_of_each, gpu_launches.every])
def test_no_kernel_is_missing(cases):
    expected = launched_in_source()
    assert len(expected) > 10
    assert {(launch.module, launch.kernel) for launch in shipped(80, cases)} == expected


def test_no_kernel_is_missing_among_the_static_figures():
    assert {variant.kernel for variant in gpu_compile.VARIANTS.values()} == {name for _, name in launched_in_source()}


def test_no_tile_is_missing(monkeypatch):
    """Each role of each table, which a rule of a launcher may then make narrower."""
    asked = set()
    tile = TileTable.tile

    def recorded(self, capability, role):
        asked.add((self, role))
        return tile(self, capability, role)

    monkeypatch.setattr(TileTable, "tile", recorded)
    shipped(90, gpu_launches.every)
    assert asked == {(table, role) for table in TABLES.values() for _, role, _ in table}


def test_gpus_like_others_have_their_tiles():
    """8.6, 8.9 and 12.0 those of 8.0, so that what `test_every_kernel` compiled for that is what they run."""
    for table in TABLES.values():
        of = {name: {role: (t.block_m, t.block_n, t.block_k, t.warps, t.stages) for a, role, t in table if a == name}
              for name in ("sm_80", "sm_86", "sm_89", "sm_100", "sm_120")}  # fmt: skip
        assert all(tiles == of["sm_80"] for tiles in of.values())


def test_what_does_not_compile_is_reported():
    """int8 products need 8.0."""
    with launches(80, (found := []).append):
        gpu_launches.attend(64, 64)
    with pytest.raises(CompileError, match="Traceback"):
        compile_launch(found[-1], 75)
