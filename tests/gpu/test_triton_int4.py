"""The int4 linear kernels in Triton's interpreter: sums bit for bit where they are integers, floats against the
reference and float64."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton.bindings import KERNELS  # noqa: E402
from tcompress.kernels.triton.int4_linear import int4_linear, int4_tile  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402

import tcompress.ops  # noqa: E402, F401
from tcompress.packing.int4 import pack_int4, unpack_int4  # noqa: E402

op = sys.modules["tcompress.ops.int4_linear"]
per_token = sys.modules["tcompress.ops.quantize_per_token"]
int8_linear = sys.modules["tcompress.ops.int8_linear"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights(n, k, group, zeros=True, scale_dtype=torch.float16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=generator)
    groups = -(-k // group)
    scale = (torch.rand(n, groups, generator=generator) * 0.02 + 0.001).to(scale_dtype)
    zero = torch.randint(0, 16, (n, groups), dtype=torch.uint8, generator=generator) if zeros else None
    return pack_int4(q), scale, zero


def reference(x, packed, group, bits, symmetric=True, bias=None, activation="none", residual=None, out_dtype=None):
    return op.reference(x, *packed, bias, None, group, bits, symmetric, activation, out_dtype, residual)


def dequantized(packed, k, group):
    weight, scale, zero = packed
    along = lambda t: t.double().repeat_interleave(group, 1)[:, :k]  # noqa: E731
    return (unpack_int4(weight, k).double() - (8 if zero is None else along(zero))) * along(scale)


SHAPES = [  # M, N, K, group
    (1, 1, 1, 32), (1, 33, 100, 32), (2, 5, 0, 64), (0, 4, 4, 32), (3, 16, 256, 256), (5, 40, 257, 64),
    (16, 31, 96, 32), (17, 40, 640, 512), (33, 33, 300, 128), (65, 70, 127, 512),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric", "zeros"), [(8, True, False), (7, False, True)])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 40, 1100, 128)])
def test_sums_of_integers_are_exact(shape, bits, symmetric, zeros):
    m, n, k, group = shape
    weight, scale, zero = weights(n, k, group, zeros)
    packed = weight, torch.ones_like(scale), zero  # sums of the groups then are integers too
    x = random(m, k)
    got = int4_linear(x, *packed, None, group, bits, symmetric)
    integers, step, act_zero = per_token.reference(x, bits, symmetric)
    sums = (integers.double() - act_zero) @ dequantized(packed, k, group).mT if k else torch.zeros(m, n)
    assert torch.equal(got, sums.float() * step)
    assert torch.equal(got, reference(x, packed, group, bits, symmetric))


@pytest.mark.parametrize("dtype", [slow(torch.float32), torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [slow(8), None])
@pytest.mark.parametrize("shape", SHAPES[1::2])
def test_scales_and_types(shape, bits, dtype):
    m, n, k, group = shape
    packed = weights(n, k, group, scale_dtype=torch.float32 if m % 2 else torch.float16)
    x, bias = random(m, k, dtype=dtype), random(n, seed=5)
    got = int4_linear(x, *packed, bias, group, bits, out_dtype=torch.float32)
    expected = reference(x, packed, group, bits, bias=bias, out_dtype=torch.float32)
    # the 16-bit types too: the weight is not rounded, and products of 16-bit numbers are exact in float32
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)
    assert int4_linear(x, *packed, bias, group, bits).dtype == dtype
    if bits is None and m and k:
        exact = x.double() @ dequantized(packed, k, group).mT + bias.double()
        torch.testing.assert_close(got.double(), exact, rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("activation", int8_linear.ACTIVATIONS)
@pytest.mark.parametrize(("m", "bits"), [slow(1, 8), (1, None), slow(4, 7), slow(40, None), (40, 8)])
def test_epilogue(m, bits, activation):
    packed = weights(33, 130, 64)
    x, bias, residual = random(m, 130, dtype=torch.bfloat16), random(33, seed=5), random(m, 33, seed=6).bfloat16()
    got = int4_linear(x, *packed, bias, 64, bits, True, activation, None, residual)
    expected = reference(x, packed, 64, bits, True, bias, activation, residual)
    assert (got.double() - expected.double()).abs().max() <= 8e-3 * expected.abs().max()


TILES = [TileConfig(1, 16, 32, split=2), TileConfig(16, 16, 32, split=1), TileConfig(16, 32, 64, split=5)]
TILES += [TileConfig(32, 16, 32, split=3), TileConfig(64, 32, 32, group=2), TileConfig(128, 16, 64)]


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("k", [slow(64), 330])
def test_every_tile(tile, k, bits):
    m = {1: 1, 16: 11, 32: 20}.get(tile.block_m, 130)
    packed = weights(34, k, 64)
    x = random(m, k)
    got = int4_linear(x, *packed, None, 64, bits, tile=tile)
    torch.testing.assert_close(got, reference(x, packed, 64, bits), rtol=2e-6, atol=4e-6)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("m", [1, 6, 40])
def test_rows_that_are_not_finite(m, bits):
    packed = weights(9, 40, 32)
    x = random(m, 40)
    x[0, 3] = math.nan
    x[-1, 0] = -math.inf
    got, expected = int4_linear(x, *packed, None, 32, bits), reference(x, packed, 32, bits)
    assert got.isnan().any()
    assert torch.equal(got.isfinite(), expected.isfinite())


def test_leading_axes_and_strides():
    x = random(2, 3, 160, seed=1)[..., ::2]
    packed = weights(30, 80, 32)
    residual = random(2, 3, 30)
    strided = (packed[0].t().contiguous().t(), packed[1].t().contiguous().t(), packed[2])
    for bits in (8, None):
        got = int4_linear(x, *strided, None, 32, bits, residual=residual)
        expected = reference(x, packed, 32, bits, residual=residual)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("bits", [8, None])
@pytest.mark.parametrize("m", [1, 5, 33])
def test_nothing_is_read_out_of_bounds(m, bits):
    def run(at_start):
        for n, k, group in ((17, 75, 32), (33, 128, 64)):
            packed = [guarded(t, at_start) for t in weights(n, k, group)]
            x, bias = guarded(random(m, k, dtype=torch.float16), at_start), guarded(random(n), at_start)
            residual = guarded(random(m, n, dtype=torch.float16), at_start)
            int4_linear(x, *packed, bias, group, bits, residual=residual)

    assert outcome(lambda: run(False)) == "ok"
    assert outcome(lambda: run(True)) == "ok"


def test_unsupported_says_why():
    x, packed = random(2, 64), weights(4, 64, 32)
    unsupported = KERNELS["int4_linear"].unsupported
    assert unsupported(x, *packed, None, None, 32) is None
    assert unsupported(x, *packed, None, None, 100) is None
    assert "layout" in unsupported(x, None, *packed[1:], None, torch.empty(0, dtype=torch.int8), 32)
    in_cuda_layout = torch.empty(0, dtype=torch.int32)
    assert "CUDA C++" in unsupported(x, None, *packed[1:], None, in_cuda_layout, 32)
    assert "48" in unsupported(x, *packed, None, None, 48)
    assert "16" in unsupported(x, *packed, None, None, 16)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16, torch.float32])
@pytest.mark.parametrize("group", [32, 128, 512, 4096])
@pytest.mark.parametrize("m", [1, 2, 32, 33, 8192])
def test_blocks_lie_within_a_group(m, group, dtype):
    tile = int4_tile(90, m, 4096, 4096, group, dtype)
    assert group % tile.block_k == 0
    assert m > 32 or tile.block_m >= m
