"""Static bars of the CUDA kernels: no spills, and enough of the hot loop is matrix products."""

from __future__ import annotations

import sys
from pathlib import Path

import nvcc_figures
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import setup_cuda

NVCC, DISASSEMBLER = setup_cuda.find_nvcc(), nvcc_figures.nvdisasm()
pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="nvcc is not installed"),
    pytest.mark.skipif(DISASSEMBLER is None, reason="triton, which ships nvdisasm, is not installed"),
]
ARCHITECTURES = (80, 90)
SLOW = pytest.mark.slow

CASES = [
    *[pytest.param("int8_linear", a, marks=[] if a == 80 else [SLOW]) for a in ARCHITECTURES],
    *[pytest.param("int4_linear", a, marks=[SLOW]) for a in ARCHITECTURES],
    *[pytest.param("attention", a, marks=[SLOW]) for a in ARCHITECTURES],
]
#: Least share of matrix instructions in the best loop of a kernel whose name holds the key, on 8.0 and on 9.0.
SHARES = {
    "int8_linear_kernelINS0_12Int8GemmTileILi128E": (0.35, 0.35),
    "int8_linear_kernelINS0_12Int8GemmTileILi64E": (0.35, 0.35),
    "attention_kernelILi64ELb0ELb0E": (0.18, 0.18),
    "attention_kernelILi128ELb0ELb0E": (0.18, 0.18),
    "attention_kernelILi256ELb0ELb0E": (0.18, 0.18),
}


@pytest.mark.parametrize(("source", "architecture"), CASES)
def test_no_spills_and_enough_products(source, architecture):
    assert NVCC
    assert DISASSEMBLER
    built = nvcc_figures.build(NVCC, source, architecture, setup_cuda.NVCC_FLAGS)
    figures = built.figures()
    assert any(f"{source}_kernel" in name for name in figures)
    for name, figure in figures.items():
        assert (figure.stack, figure.spill_stores, figure.spill_loads) == (0, 0, 0), name
        assert figure.registers <= 255
    for name, loops in nvcc_figures.loops(DISASSEMBLER, built.cubin).items():
        for key, shares in SHARES.items():
            if key in name:
                least = shares[ARCHITECTURES.index(architecture)]
                assert max(loop.mma_share for loop in loops) >= least, name
