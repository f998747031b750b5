"""A small kernel as nvcc compiles it, run in the PTX emulator: right as it is, and each planted defect is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import nvcc
import pytest
from ptx import (
    AsyncNotWaited,
    Buffer,
    DivergentBarrier,
    DivergentWarp,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialised,
    run_ptx,
)

pytestmark = pytest.mark.skipif(nvcc.missing() is not None, reason=nvcc.missing() or "")

SOURCE = Path(__file__).parent / "samples" / "tiled_product.cu"


def run(m: int, architecture: int = 80, defines: tuple[str, ...] = (), reverse: bool = False) -> None:
    n, k = 64, 96
    rng = np.random.default_rng(0)
    a, b = (rng.integers(-128, 128, (rows, k)).astype(np.int8) for rows in (m, n))
    c, row_max = np.zeros((m, n), np.int32), np.zeros((m, n // 64), np.int32)
    run_ptx(
        nvcc.compile_ptx(SOURCE, architecture, defines), "tiled_product", (n // 64, -(-m // 64), 1), (128, 1, 1),
        [a, b, Buffer(c, written=False), Buffer(row_max, written=False), m, n, k], reverse=reverse,
    )  # fmt: skip
    expected = a.astype(np.int64) @ b.astype(np.int64).T
    assert (c == expected).all()
    assert (row_max == expected.reshape(m, n // 64, 64).max(2)).all()


@pytest.mark.parametrize("architecture", [80, 89])
@pytest.mark.parametrize("m", [128, 75, 1])
def test_product_is_exact(m, architecture):
    run(m, architecture)


def test_the_order_of_blocks_changes_nothing():
    run(128, reverse=True)


@pytest.mark.parametrize(
    ("defect", "error"),
    [
        ("NO_BARRIER_BEFORE", Race),
        ("NO_BARRIER_AFTER", Race),
        ("WAIT", AsyncNotWaited),
        ("BOUND", OutOfBounds),
        ("MASK", OutOfBounds),
        ("UNALIGNED", Misaligned),
        ("VECTOR", Misaligned),
        ("SHUFFLE", DivergentWarp),
        ("UNWRITTEN", Uninitialised),
        ("DIVERGENT", DivergentBarrier),
        ("SOME_WARPS", DivergentBarrier),
    ],
)
def test_planted_defects_are_reported(defect, error):
    with pytest.raises(error, match=r"block \(.*line \d+"):
        run(75, defines=(f"DEFECT_{defect}",))
