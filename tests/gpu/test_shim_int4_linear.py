"""csrc/cuda/int4_linear.cuh on the CPU, thread by thread, against float64 and the reference."""

from __future__ import annotations

import sys

import pytest
import shim_library
import torch
from shim_library import ACTIVATIONS, Library, caught

import tcompress.ops  # noqa: F401
from tcompress.ops import int4_cuda_layout
from tcompress.packing.int4 import pack_int4

int4_linear = sys.modules["tcompress.ops.int4_linear"]  # the name in the package is the function
pytestmark = pytest.mark.skipif(shim_library.compiler() is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def lib() -> Library:
    return shim_library.library()


def weights(n: int, k: int, group: int, zeros: bool, dtype: torch.dtype) -> tuple:
    generator = torch.Generator().manual_seed(n + k)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    groups = -(-k // group)
    scale = (torch.rand(n, groups, generator=generator) / 10 + 0.01).to(dtype)
    zero = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator) if zeros else None
    return q, scale, zero


def dense(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, group: int) -> torch.Tensor:
    k = q.shape[1]
    spread = [(8.0 if t is None else t.double().repeat_interleave(group, 1)[:, :k]) for t in (zero, scale)]
    return (q.double() - spread[0]) * spread[1]


def inputs(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("m", "n", "k", "group", "zeros", "order"),
    [
        (1, 33, 1000, 128, True, "random"),
        (16, 32, 256, 32, False, "forward"),
        (17, 129, 64, 64, True, "reverse"),
        (70, 40, 333, 333, True, "warp greedy"),
        (65, 7, 200, 64, False, "random"),
        (3, 64, 31, 32, True, "warp greedy"),
    ],
)
def test_product_is_right(lib, m, n, k, group, zeros, order, dtype):
    """Products of 16-bit floats with integers are exact; what is left is the order of float32 sums. All orders of the
    threads: the planted bugs below, which first run without."""
    lib.order = order
    q, scale, zero = weights(n, k, group, zeros, torch.float16 if m % 2 else torch.float32)
    x = inputs(m, k, dtype)
    got = lib.int4_linear(x, pack_int4(q), scale, zero, group)
    w = dense(q, scale, zero, group)
    error = (got.double() - x.double() @ w.t()).abs()
    assert (error <= 2e-6 * (x.double().abs() @ w.abs().t())).all()


def test_integers_are_exact(lib):
    """Whole numbers in, whole numbers out: one wrong nibble would show."""
    q, scale, zero = weights(40, 96, 32, True, torch.float32)
    x = torch.randint(-8, 9, (20, 96), generator=torch.Generator().manual_seed(5)).half()
    got = lib.int4_linear(x, pack_int4(q), torch.ones_like(scale), zero, 32)
    assert torch.equal(got.double(), x.double() @ dense(q, torch.ones_like(scale), zero, 32).t())


@pytest.mark.parametrize(
    ("n", "k", "group", "zeros"), [(33, 70, 32, True), (64, 128, 128, False), (1, 1, 32, True), (97, 300, 300, True)]
)
def test_layout_is_that_of_the_op(lib, n, k, group, zeros):
    """What the kernel makes of a weight is what `int4_prepack` says it is, bit for bit."""
    q, scale, zero = weights(n, k, group, zeros, torch.float16 if n % 2 else torch.float32)
    got = lib.int4_pack(pack_int4(q), scale, zero, k, group)
    assert torch.equal(got.view(torch.int32), int4_cuda_layout.pack(pack_int4(q), scale, zero, k, group))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 8, 2047, 2049])
def test_gate(lib, count, dtype):
    y, gate = torch.randn(count).to(dtype), torch.randn(count)
    assert torch.equal(lib.gate(y, gate), (y.float() * gate).to(dtype))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_epilogue_is_that_of_the_op(lib, activation, dtype):
    q, scale, zero = weights(37, 128, 64, True, torch.float16)
    x = inputs(9, 128, dtype)
    bias, residual = torch.randn(37), torch.randn(9, 37).to(dtype)
    got = lib.int4_linear(x, pack_int4(q), scale, zero, 64, bias, residual, activation, dtype)
    expected = int4_linear.reference(
        x, pack_int4(q), scale, zero, bias, None, 64, None, True, activation, torch.float32, residual.float()
    )
    assert got.dtype == dtype
    assert (got.float() - expected).abs().max() <= (1e-3 if dtype == torch.float16 else 8e-3) * expected.abs().max()


@pytest.mark.parametrize("bug", ["missing barrier", "unwaited copy", "off by one"])
@pytest.mark.parametrize("m", [3, 40])
def test_planted_bug_is_caught(lib, m, bug):
    q, scale, zero = weights(70, 1024, 64, True, torch.float32)
    x = inputs(m, 1024, torch.float16)
    w = dense(q, scale, zero, 64)

    def run() -> bool:
        error = (lib.int4_linear(x, pack_int4(q), scale, zero, 64).double() - x.double() @ w.t()).abs()
        return bool((error <= 2e-6 * (x.double().abs() @ w.abs().t())).all())

    assert not caught(lib, run)
    with lib.plant(bug):
        assert caught(lib, run)
