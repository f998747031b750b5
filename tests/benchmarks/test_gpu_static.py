"""The static figures of the GPU kernels: how machine code is read, what fits a multiprocessor, what bounds the time,
and that no kernel got worse than benchmarks/gpu_static.json has it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gpu_nvcc
import gpu_static
import pytest
from gpu_bounds import PROBLEMS, AttentionProblem, LinearProblem, Step
from gpu_machine import GPUS, MULTIPROCESSORS, Occupancy, occupancy
from gpu_sass import category, hottest, mma_units, parse

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
BASELINE = json.loads(gpu_static.BASELINE.read_text())

LISTING = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDGDEPBAR ;
        /*0020*/                   HMMA.16816.F32 R4, R8, R16, R4 ;
        /*0030*/               @P0 FADD R2, R2, R3 ;
        /*0040*/                   LDSM.16.M88.4 R8, [R9] ;
        /*0050*/              @!P1 BRA `(.L_x_0) ;
.L_x_1:
        /*0060*/                   IMMA.16832.S8.S8 R4, R8.ROW, R16.COL, R4 ;
        /*0070*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
        /*0090*/                   EXIT ;
.L_x_2:
        /*00a0*/                   BRA `(.L_x_2);
"""


def test_loops_of_a_listing():
    opcodes, loops = parse(LISTING)
    assert len(opcodes) == 11
    assert loops == [(1, 5), (6, 8)]
    hot = hottest(opcodes, loops)
    assert hot.instructions == 3  # as many matrix instructions in fewer
    assert hot.mix == {"branch": 1, "integer": 1, "mma": 1}
    assert hot.mma_share == pytest.approx(1 / 3)


def test_a_loop_without_matrix_instructions_is_the_longest():
    opcodes = ["FADD", "BRA", "FADD", "FMUL", "BRA"]
    assert hottest(opcodes, [(0, 1), (2, 4)]).instructions == 3
    assert hottest(opcodes, []) is None


@pytest.mark.parametrize(
    ("opcode", "expected"),
    [
        ("LDGDEPBAR", "wait"), ("LDGSTS.E.BYPASS.128", "async copy"), ("LDG.E.128", "global"),
        ("LDSM.16.M88.4", "shared"),
        ("LDL.64", "spill"), ("MUFU.EX2", "exp2"), ("F2FP.F16.F32.PACK_AB", "convert"), ("I2FP.F32.S32", "convert"),
        ("IMAD.MOV.U32", "move"), ("IMAD.WIDE", "integer"), ("HFMA2.MMA", "float"), ("HGMMA.64x64x16.F32", "mma"),
        ("FMNMX", "float"), ("UISETP.GE.AND", "integer"), ("WARPGROUP.ARRIVE", "wait"), ("SHFL.BFLY", "shuffle"),
    ],
)  # fmt: skip
def test_category(opcode, expected):
    assert category(opcode) == expected


def test_units_of_matrix_instructions():
    opcodes = ("HMMA.16816.F32", "IGMMA.64x64x32.S8.S8", "HGMMA.64x128x16.F32", "HFMA2.MMA", "FADD")
    assert [mma_units(o) for o in opcodes] == [1, 8, 16, 0, 0]


def test_occupancy_by_each_resource():
    assert occupancy(80, 4, 255, 0) == Occupancy(2, 8, "registers", 8 / 64)
    assert occupancy(90, 8, 128, 91136) == Occupancy(2, 16, "registers", 16 / 64)
    assert occupancy(89, 4, 32, 47616) == Occupancy(2, 8, "shared memory", 8 / 48)
    assert occupancy(80, 8, 32, 0) == Occupancy(8, 64, "registers", 1.0)
    assert occupancy(80, 1, 16, 0) == Occupancy(32, 32, "blocks", 0.5)
    assert occupancy(89, 4, 32, 100 * 1024) == Occupancy(0, 0, "shared memory", 0.0)


OCCUPANCY = """
#include <cstdio>
#include <cstdlib>
#include <cstddef>
#include <cuda_occupancy.h>
// arguments: architecture, warps and bytes of a multiprocessor; then of each block: warps, registers, bytes
int main(int count, char** words) {
  int architecture = atoi(words[1]), shared = atoi(words[3]);
  cudaOccDeviceProp device;
  device.computeMajor = architecture / 10, device.computeMinor = architecture % 10;
  device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * atoi(words[2]);
  device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32, device.numSms = 1;
  device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared;
  device.sharedMemPerBlockOptin = shared - 1024, device.reservedSharedMemPerBlock = 1024;
  for (int at = 4; at + 2 < count; at += 3) {
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = atoi(words[at + 1]), kernel.sharedSizeBytes = 0;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = shared - 1024;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_SHARED, state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    int error = cudaOccMaxActiveBlocksPerMultiprocessor(
        &result, &device, &kernel, &state, 32 * atoi(words[at]), atoi(words[at + 2]));
    printf("%d ", error ? -1 : result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_triton
@pytest.mark.parametrize("architecture", [80, 86, 89, 90])
def test_occupancy_is_nvidia_s(architecture, tmp_path):
    """Against the header that NVIDIA's own calculator is made of, which Triton ships."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    triton = Path(importlib.util.find_spec("triton").origin).parent
    include = triton / "backends" / "nvidia" / "include"
    (tmp_path / "occupancy.cpp").write_text(OCCUPANCY)
    program = tmp_path / "occupancy"
    subprocess.run(["g++", "-I", str(include), "-o", str(program), str(tmp_path / "occupancy.cpp")], check=True)
    has = MULTIPROCESSORS[architecture]
    cases = [
        (warps, registers, shared)
        for warps in (1, 2, 4, 8, 16)
        for registers in (16, 33, 64, 96, 128, 168, 255)
        for shared in (0, 1000, 16400, 40976, 91136)
        if registers * 32 * warps <= 65536
    ]
    words = [str(v) for v in (architecture, has.warps, has.shared, *(v for case in cases for v in case))]
    out = subprocess.run([str(program), *words], check=True, capture_output=True, text=True).stdout
    assert [occupancy(architecture, *case).blocks for case in cases] == [int(v) for v in out.split()]


def test_bounds():
    h100, a100, _ = GPUS
    step = Step(work=64 * 64, rows=64, warps=4, instructions=400)
    least = AttentionProblem("", "", heads=128, s=4096, d=128).bounds(a100, step)
    pairs = 128 * 4096**2
    assert least.products == pytest.approx(1e6 * 2 * 128 * pairs * (1 / 312e12 + 1 / 624e12), rel=1e-3)
    assert least.exponentials == pytest.approx(1e6 * pairs / (16 * 108 * 1.41e9), rel=1e-3)
    assert least.issue == pytest.approx(1e6 * pairs / 4096 * 4 * 400 / (4 * 108 * 1.41e9), rel=1e-3)
    assert least.least == least.products
    causal = AttentionProblem("", "", heads=128, s=4096, d=128, causal=True).bounds(a100, step)
    assert (causal.products, causal.memory) == (pytest.approx(least.products / 2, rel=1e-3), least.memory)
    one = LinearProblem("", "", m=1, n=4096, k=4096).bounds(h100, Step(16 * 32 * 256, 16, 4, 100))
    assert one.least == one.memory == pytest.approx(1e6 * 4096 * 4096 / 3.35e12, rel=0.02)


def test_worse_says_what():
    def entry(**changes):
        return {"registers": 100, "spills": 0, "stack": 0, "loop": {"mma units %": 20.0}} | changes

    def found(**changes):
        return gpu_static.worse({"sm_80": {"a": entry()}}, {"sm_80": {"a": entry(**changes)}})

    assert found() == found(registers=108) == found(registers=40) == found(loop={"mma units %": 17.0}) == []
    assert found(registers=109) == ["sm_80 a: 109 registers, 100 before"]
    assert found(spills=1, stack=8) == ["sm_80 a: 1 spills, 0 before", "sm_80 a: 8 stack, 0 before"]
    assert found(loop={"mma units %": 16.9}) == ["sm_80 a: 16.9 % matrix instructions, 20.0 % before"]
    assert found(loop={}) != []
    assert "not in the baseline" in gpu_static.worse({}, {"sm_80": {"a": entry()}})[0]


def test_baseline_holds_the_bars():
    """docs/gpu.md: matrix instructions among those issued in the loop without masks, in units of 8.x."""
    for architecture, entries in BASELINE["kernels"].items():
        for d, bar in ((64, 16.0), (128, 19.5)):
            entry = entries[f"attention d{d}"]
            assert entry["spills"] == entry["stack"] == 0
            assert entry["loop"]["mma units %"] >= bar, architecture
        assert all(e["programs a multiprocessor"] >= 1 for e in entries.values())


def test_int8_linear_holds_its_bars():
    """Nothing spills, and 35 % of what the loop issues multiplies, in units of 8.x; but for 128 tokens on 9.0, whose
    tile was measured to be the fastest there, and up to 32, where reading the weight is the work."""
    for architecture, entries in BASELINE["kernels"].items():
        found = {name: e for name, e in entries.items() if e.get("tile", "").startswith("int8_linear/")}
        assert len(found) >= 8
        for name, entry in found.items():
            assert entry["spills"] == entry["stack"] == 0, (architecture, name)
            if "m8192" in name or ("m128" in name and architecture != "sm_90"):
                assert entry["loop"]["mma units %"] >= 35, (architecture, name)


def test_baseline_has_bounds_of_every_problem():
    for gpu in GPUS:
        assert set(BASELINE["microseconds at least"][gpu.name]) == {p.name for p in PROBLEMS}


def run(*arguments):
    """The script, in a process in which Triton compiles."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(gpu_static.BASELINE.with_suffix(".py")), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@needs_triton
def test_a_few_kernels_are_no_worse():
    """Also of another release of Triton, which may compile otherwise: then look, and write the file anew."""
    names = ("attention d64", "attention d128 causal", "linear m8192")
    process = run("--compare", "--architecture", "80", *(word for name in names for word in ("--variant", name)))
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stdout == "nothing got worse, of 3 kernels\n"


@needs_triton
@pytest.mark.slow
def test_no_kernel_is_worse():
    process = run("--compare")
    assert process.returncode == 0, process.stdout + process.stderr


@needs_triton
def test_a_part_is_not_written():
    before = gpu_static.BASELINE.read_bytes()
    process = run("--variant", "linear m16", "--architecture", "80")
    assert process.returncode == 2
    assert "not written" in process.stderr
    assert gpu_static.BASELINE.read_bytes() == before


KERNEL = """
namespace ours { namespace {
template <int N> struct Tile {};
template <typename T> __global__ void __launch_bounds__(96) add(float* x, int n) {
  for (int i = threadIdx.x; i < n; i += 96) x[i] += 1.0f;
}
} }
template __global__ void ours::add<ours::Tile<4>>(float*, int);
"""


@needs_triton
def test_kernels_of_nvcc(tmp_path):
    if gpu_nvcc.nvcc() is None:
        pytest.skip("nvcc is not installed")
    (tmp_path / "add.cu").write_text(KERNEL)
    found = gpu_static.kernels_of_nvcc([80], tmp_path)
    ((name, entry),) = found["sm_80"].items()
    assert name.replace(" ", "") == "cudaadd<Tile<4>>"
    assert entry["warps"] == 3
    assert entry["loop"]["mix"]["global"] >= 2
    assert gpu_static.kernels_of_nvcc([80], tmp_path / "nothing") == {}
