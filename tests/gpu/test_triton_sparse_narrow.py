"""The kernel of few tokens and blocks of zeros, and that of many, in each other's place: where tiles are measured, both
are candidates."""

from __future__ import annotations

import math

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton import int4_sparse_layout, sparse_layout  # noqa: E402
from tcompress.kernels.triton.block_panels import BlockRows  # noqa: E402
from tcompress.kernels.triton.block_sparse_linear import block_sparse_linear, block_sparse_tile  # noqa: E402
from tcompress.kernels.triton.block_sparse_narrow import FEW_TOKENS, narrow_candidates, narrow_tile  # noqa: E402
from tcompress.kernels.triton.int4_sparse_linear import int4_sparse_linear, int4_sparse_tile  # noqa: E402

from tcompress.ops._registry import OPS  # noqa: E402

SIZES = {"8x4": (8, 4), "16x16": (16, 16), "32x16": (32, 16)}
I8, F16, F32 = torch.int8, torch.float16, torch.float32


def dense_weight(n, k, dtype, seed=0):
    """Blocks of 16 x 16, some of them zero, a row of them empty."""
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(-(-n // 16), -(-k // 16), generator=generator) < 0.6
    keep[1:2] = False
    keep = keep.repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :k]
    if dtype == I8:
        return torch.randint(-128, 128, (n, k), dtype=I8, generator=generator) * keep
    return torch.randn(n, k, generator=generator).to(dtype) * keep


def tokens(m, k, dtype=F32):
    return torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)


def run(x, dense, pattern, tile, scale=None, guard=None, **options):
    n, k = dense.shape
    packed = sparse_layout.pack(dense, pattern)
    if guard is not None:
        x, packed = guarded(x, guard), guarded(packed, guard)
    weight = sparse_layout.parts(packed, n, k, dense.dtype, pattern)
    kept = BlockRows(weight.start, weight.column)
    operands = (x, weight.values, kept, n, SIZES[pattern], scale, weight.total)
    return block_sparse_linear(*operands, tile=tile, **options)


def tiles(pattern, dtype):
    """That of few tokens, as stored and smaller, and that of many."""
    narrow = narrow_tile(90, SIZES[pattern])
    return (narrow, narrow_candidates(narrow)[0], block_sparse_tile(90, FEW_TOKENS + 1, SIZES[pattern], dtype))


@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("scheme", [(8, True), (7, False)])
def test_sums_are_exact(pattern, scheme):
    for m, n, k in ((1, 40, 300), (7, 17, 33)):
        x, dense, scale = tokens(m, k), dense_weight(n, k, I8), torch.rand(n)
        expected = OPS["int8_linear"].reference(x, dense, scale, None, None, *scheme, "none", torch.int32)
        for tile in tiles(pattern, I8):
            options = {"act_bits": scheme[0], "act_symmetric": scheme[1], "out_dtype": torch.int32}
            assert torch.equal(run(x, dense, pattern, tile, scale, **options), expected), tile


@pytest.mark.parametrize("pattern", SIZES)
@pytest.mark.parametrize("dtype", [F16, F32])
def test_floats(pattern, dtype):
    n, k = 33, 70
    x, dense, bias = tokens(3, k, dtype), dense_weight(n, k, dtype), torch.randn(n)
    x[1, 5] = math.nan
    residual = tokens(3, n)
    expected = torch.relu(x.double() @ dense.double().t() + bias) + residual
    for tile in tiles(pattern, dtype):
        options = {"bias": bias, "activation": "relu", "out_dtype": F32, "residual": residual}
        got = run(x, dense, pattern, tile, **options)
        torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=3e-6, equal_nan=True)
        assert got[1].isnan().all()


def run_int4(x, dense, scale, group_size, pattern, tile, scheme, guard=None):
    (n, k), size = dense.shape, SIZES[pattern]
    packed = int4_sparse_layout.pack(dense, scale, group_size, pattern)
    if guard is not None:
        x, packed = guarded(x, guard), guarded(packed, guard)
    weight = int4_sparse_layout.parts(packed, n, k, group_size, scale.dtype, pattern)
    operands = (x, weight.values, BlockRows(weight.start, weight.column), weight.scale, size, None)
    return int4_sparse_linear(*operands, *scheme, tile=tile, group_size=group_size)


@pytest.mark.parametrize("pattern", int4_sparse_layout.PATTERNS)
@pytest.mark.parametrize("scheme", [(8, True), (7, False)])
def test_four_bits(pattern, scheme):
    narrow, wide = narrow_tile(90, SIZES[pattern]), int4_sparse_tile(90, 1, SIZES[pattern], narrow=False)
    assert wide.block_m > 1
    for m, n, k, group_size in ((1, 24, 131, 64), (5, 9, 40, 65536)):
        x, dense = tokens(m, k), dense_weight(n, k, I8) >> 4
        groups = -(-k // group_size)
        ones, steps = torch.ones(n, groups), torch.rand(n, groups).half()
        exact = run_int4(x, dense, ones, group_size, pattern, wide, scheme)
        near = run_int4(x, dense, steps, group_size, pattern, wide, scheme)
        for tile in (narrow, narrow_candidates(narrow)[0]):
            assert torch.equal(run_int4(x, dense, ones, group_size, pattern, tile, scheme), exact)
            got = run_int4(x, dense, steps, group_size, pattern, tile, scheme)
            torch.testing.assert_close(got, near, rtol=2e-6, atol=2e-6 * near.abs().max().item())


@pytest.mark.parametrize("pattern", SIZES)
def test_nothing_is_read_out_of_bounds(pattern):
    narrow = narrow_tile(90, SIZES[pattern])

    def everything(at_start):
        for dtype in (I8, F32):
            scale = torch.ones(33) if dtype == I8 else None
            run(tokens(1, 75), dense_weight(33, 75, dtype), pattern, narrow, scale, at_start)
        if pattern in int4_sparse_layout.PATTERNS:
            dense = dense_weight(33, 75, I8) >> 4
            run_int4(tokens(1, 75), dense, torch.ones(33, 3), 32, pattern, narrow, (7, False), at_start)

    assert outcome(lambda: everything(False)) == "ok"
    assert outcome(lambda: everything(True)) == "ok"


def test_few_tokens_take_it():
    for size in SIZES.values():
        assert [block_sparse_tile(90, m, size, I8).block_m for m in (1, FEW_TOKENS, FEW_TOKENS + 1)] == [1, 1, 16]
        assert [int4_sparse_tile(90, m, size).block_m for m in (1, FEW_TOKENS, FEW_TOKENS + 1)] == [1, 1, 16]
