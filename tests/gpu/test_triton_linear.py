"""The linear kernels and their quantizer in Triton's interpreter: integers bit for bit, floats against the
reference."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import triton_cases

triton_cases.require()

from tcompress.kernels.triton import quantize_tokens as quantizer  # noqa: E402
from tcompress.kernels.triton.bindings import KERNELS  # noqa: E402
from tcompress.kernels.triton.linear import linear  # noqa: E402
from tcompress.kernels.triton.linear_tiles import int8_linear_tile  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402

import tcompress.ops  # noqa: E402, F401

# the names in the package are the functions
per_token = sys.modules["tcompress.ops.quantize_per_token"]
int8_linear = sys.modules["tcompress.ops.int8_linear"]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (7, False), (7, True), (4, True), (2, False)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 64), (4, 300), (3, 9001), (0, 8), (4, 0)])
def test_quantizer_is_exact(shape, bits, symmetric, dtype):
    x = random(*shape, dtype=dtype) * 3
    if shape[0] > 2 and shape[1] > 1:
        x[1], x[2, -1], x[0, 0] = 0, math.nan, 1e4
    q, scale, zero = quantizer.quantize_tokens(x, bits, symmetric)
    expected, expected_scale, expected_zero = per_token.reference(x, bits, symmetric)
    assert torch.equal(q[:, : shape[1]].int(), expected.int())
    assert (q[:, shape[1] :] == 0).all()
    assert torch.equal(scale.view(torch.int32), expected_scale[:, 0].contiguous().view(torch.int32))
    assert torch.equal(zero, expected_zero[:, 0])


def test_quantizer_takes_strides():
    x = random(40, 6).t()[::2]
    q, scale, _ = quantizer.quantize_tokens(x)
    expected, expected_scale, _ = per_token.reference(x, 8, True)
    assert torch.equal(q[:, :40], expected)
    assert torch.equal(scale, expected_scale[:, 0])


def arguments(m, n, k, dtype, seed=0):
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(seed))
    return random(m, k, dtype=dtype, seed=seed), weight, random(n, seed=seed).abs() * 0.01


SHAPES = [
    (1, 1, 1), (1, 33, 100), (1, 70, 2100), (2, 5, 0), (0, 4, 4), (3, 16, 1024), (5, 128, 256), (16, 31, 257), (17,
    40, 64), (33, 33, 300), (64, 65, 127), (65, 130, 70), (130, 257, 129),
]  # fmt: skip


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (7, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_sums_are_exact(shape, bits, symmetric):
    x, weight, scale = arguments(*shape, torch.float32)
    got = linear(x, weight, scale, None, None, bits, symmetric, "none", torch.int32)
    assert torch.equal(got, int8_linear.reference(x, weight, scale, None, None, bits, symmetric, "none", torch.int32))


@pytest.mark.parametrize("activation", int8_linear.ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 33, 100), (4, 20, 64), (40, 33, 70), (70, 65, 40)])
def test_epilogue(shape, dtype, activation):
    x, weight, scale = arguments(*shape, dtype)
    bias, residual = random(shape[1], seed=5), random(*shape[:2], dtype=dtype, seed=6)
    got = linear(x, weight, scale, bias, None, 7, False, activation, None, residual)
    sums = int8_linear.reference(x, weight, scale, None, None, 7, False, "none", torch.int32)
    token_scale = per_token.reference(x, 7, False)[1]
    y = int8_linear.activate(sums.double() * token_scale.double() * scale.double() + bias.double(), activation)
    y = y + residual.double()
    assert got.dtype == dtype
    limit = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert (got.double() - y).abs().max() <= limit * y.abs().max()


TILES = [TileConfig(16, 16, 64, split=s) for s in (1, 2, 8)] + [
    TileConfig(32, 32, 32),
    TileConfig(64, 32, 64, group=1),
]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("k", [63, 64, 520])
def test_every_tile(tile, k):
    m = 11 if tile.block_m == 16 else 150
    x, weight, scale = arguments(m, 50, k, torch.float32)
    bias = random(50)
    got = linear(x, weight, scale, bias, tile=tile)
    expected = int8_linear.reference(x, weight, scale, bias, None, 8, True, "none", None)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


def test_one_token_is_quantized_within():
    x, weight, scale = arguments(1, 40, 3000, torch.bfloat16)
    fused = linear(x, weight, scale, out_dtype=torch.int32, fuse_quantizer=True)
    assert torch.equal(fused, linear(x, weight, scale, out_dtype=torch.int32, fuse_quantizer=False))


def test_rows_that_are_not_finite():
    x, weight, scale = arguments(6, 9, 40, torch.float32)
    x[2, 3], x[4, 0] = math.nan, math.inf
    for rows in (x, x[2:3]):
        for activation in int8_linear.ACTIVATIONS:
            out = linear(rows, weight, scale, activation=activation)
            assert torch.equal(out.isnan().all(1), ~rows.isfinite().all(1))
            assert out.isnan().any(1).sum() == out.isnan().all(1).sum()


def test_leading_axes_and_strides():
    x = random(2, 3, 80, seed=1)[..., ::2]
    weight = torch.randint(-127, 128, (40, 30), dtype=torch.int8).t()
    scale, residual = torch.rand(30), random(2, 3, 30)
    got = linear(x, weight, scale, residual=residual)
    expected = int8_linear.reference(x, weight, scale, None, None, 8, True, "none", None, residual)
    torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("m", [1, 16, 32, 33, 128, 8192])
@pytest.mark.parametrize("n", [1, 1024, 4096, 11008])
def test_tiles_hold_the_tokens(capability, m, n):
    tile = int8_linear_tile(capability, m, n, 4096)
    assert tile.block_m >= (m if m <= 32 else 64)
    assert tile.name.startswith(f"int8_linear/sm_{capability}/")


def test_unsupported_says_why():
    x, weight, scale = arguments(2, 3, 16, torch.float32)
    of_linear, of_quantizer = (KERNELS[op].unsupported for op in ("int8_linear", "quantize_per_token"))
    assert of_linear(x, weight, scale) is None
    assert "layout" in of_linear(x, None, scale)
    assert of_quantizer(x, 8, True) is None
    assert of_quantizer(x, 7, False) is None
    assert "bits=8" in of_quantizer(x, 8, False)
