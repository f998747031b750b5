"""csrc/cuda/two_four_linear.cuh on the CPU, thread by thread: sums bit for bit."""

from __future__ import annotations

import pytest
import shim_library
import torch
from shim_library import Library, caught

from tcompress import ops
from tcompress.packing.sparse_n_m import pack_n_m

pytestmark = pytest.mark.skipif(shim_library.compiler() is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def lib() -> Library:
    return shim_library.library()


def weight(n: int, k: int) -> torch.Tensor:
    """int8 with at most two values in four that are not zero; some groups have fewer."""
    generator = torch.Generator().manual_seed(n * k)
    dense = torch.randint(-128, 128, (n, -(-k // 4), 4), dtype=torch.int8, generator=generator)
    keep = torch.rand(dense.shape, generator=generator).argsort(-1) < 2
    keep &= torch.rand(dense.shape, generator=generator) < 0.9
    dense = torch.where(keep, dense, 0).view(n, -1)
    dense[:, k:] = 0
    return dense[:, :k].contiguous()


def activations(m: int, k: int) -> torch.Tensor:
    a = torch.randint(-128, 128, (m, k), dtype=torch.int8, generator=torch.Generator().manual_seed(m))
    return torch.nn.functional.pad(a, (0, -k % 16)).contiguous()


def product(lib: Library, m: int, w: torch.Tensor, **options) -> torch.Tensor:
    n, k = w.shape
    stored = pack_n_m(w, (2, 4), 8)
    return lib.two_four_linear(
        activations(m, k), stored.values, stored.index, torch.ones(m), torch.ones(n), k,
        out_dtype=torch.int32, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("m", "n", "k", "multiprocessors", "order"),
    [
        (1, 33, 1000, 4, "warp greedy"),
        (8, 32, 512, 4, "forward"),
        (9, 65, 200, 4, "reverse"),
        (130, 131, 333, 1, "random"),  # the widest tile
        (130, 131, 333, 1, "warp greedy"),
        (40, 16, 64, 4, "random"),
        (3, 5, 1, 4, "reverse"),
    ],
)
def test_sums_are_exact(lib, m, n, k, multiprocessors, order):
    lib.order = order
    w = weight(n, k)
    got = product(lib, m, w, multiprocessors=multiprocessors)
    assert torch.equal(got.double(), activations(m, k)[:, :k].double() @ w.double().t())


@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 64), (33, 130), (40, 1000)])
def test_the_layout_of_the_op_is_the_kernel_s(lib, n, k):
    """`sparse_prepack` packs in plain torch."""
    w = weight(n, k)
    stored = pack_n_m(w, (2, 4), 8)
    assert torch.equal(
        lib.two_four_pack(stored.values, stored.index, n, k).view(torch.int8), ops.sparse_prepack(w, "mma-2:4")
    )


def test_epilogue(lib):
    w, m = weight(37, 128), 11
    n, k = w.shape
    stored, scale = pack_n_m(w, (2, 4), 8), torch.rand(m)
    weight_scale, bias = torch.rand(n), torch.randn(n)
    got = lib.two_four_linear(
        activations(m, k), stored.values, stored.index, scale, weight_scale, k, bias, "relu", torch.float16
    )
    sums = (activations(m, k).double() @ w.double().t()).float()
    assert torch.equal(got, torch.relu(sums * scale[:, None] * weight_scale + bias).half())


@pytest.mark.parametrize("bug", ["missing barrier", "unwaited copy", "off by one"])
@pytest.mark.parametrize(("m", "k"), [(5, 2048), (20, 512)])
def test_planted_bug_is_caught(lib, m, k, bug):
    w = weight(20, k)
    expected = activations(m, k).double() @ w.double().t()

    def run() -> bool:
        return torch.equal(product(lib, m, w).double(), expected)

    assert not caught(lib, run)
    with lib.plant(bug):
        assert caught(lib, run)
