"""The kernels of sparse weights in Triton's interpreter, from the storage layout: integers bit for bit, floats against
the dense layer."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton import block_sparse_linear as blocks  # noqa: E402
from tcompress.kernels.triton import int4_sparse_linear as int4  # noqa: E402
from tcompress.kernels.triton import two_four_linear as two_four  # noqa: E402
from tcompress.kernels.triton.block_panels import block_rows  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402

import tcompress.ops  # noqa: E402, F401
from tcompress.packing import pack_sparse  # noqa: E402
from tcompress.packing.int4 import pack_int4  # noqa: E402
from tcompress.packing.sparse_index import decode_index  # noqa: E402

int8_linear = sys.modules["tcompress.ops.int8_linear"]
int4_linear = sys.modules["tcompress.ops.int4_linear"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def pruned(n, k, pattern, dtype, density=0.3, seed=0):
    """A weight with the pattern; a row of blocks, where there are two, is empty."""
    generator = torch.Generator().manual_seed(seed)
    if pattern == "2:4":
        drop = torch.rand(n, -(-k // 4), 4, generator=generator).argsort(-1) >= 2
        keep = ~drop.flatten(1)[:, :k]
    else:
        r, c = map(int, pattern.split("x"))
        grid = torch.rand(-(-n // r), -(-k // c), generator=generator) < density
        grid[1:2] = False
        keep = grid.repeat_interleave(r, 0).repeat_interleave(c, 1)[:n, :k]
    if dtype == torch.int8:
        dense = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    else:
        dense = torch.randn(n, k, generator=generator).to(dtype)
    return dense * keep


def run(x, dense, pattern, scale=None, guard=None, **options):
    """The kernel on the storage layout of a dense weight."""
    packed = pack_sparse(dense, pattern, scale=scale)
    values, index, total = packed.values, packed.index, dense.sum(1, dtype=torch.int32) if scale is not None else None
    if guard is not None:
        x, values, index = guarded(x, guard), guarded(values, guard), guarded(index, guard)
        total = None if total is None else guarded(total, guard)
    n, k = dense.shape
    if pattern == "2:4":
        assert two_four.unsupported(pattern, values.dtype) is None
        return two_four.two_four_linear(x, values, index, n, scale, total, **options)
    assert blocks.unsupported(pattern, values.dtype) is None
    size = tuple(map(int, pattern.split("x")))
    grid = (-(-n // size[0]), -(-k // size[1]))
    kept = block_rows(decode_index(packed.index, packed.index_kind, grid[0] * grid[1]).view(grid))
    if guard is not None:
        kept = type(kept)(*(guarded(t, guard) for t in kept))
    return blocks.block_sparse_linear(x, values, kept, n, size, scale, total, **options)


PATTERNS = ["2:4", "8x4", "16x16"]
SHAPES = [(1, 1, 1), (1, 40, 300), (3, 17, 64), (2, 5, 0), (0, 4, 4), (17, 33, 131), (40, 16, 258), (70, 40, 96)]
QUICK = [SHAPES[1], *(slow(s) for s in SHAPES[:1] + SHAPES[2:3]), *SHAPES[3:6], *(slow(s) for s in SHAPES[6:])]


@pytest.mark.parametrize(("bits", "symmetric"), [slow(8, True), (7, False)])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("shape", QUICK)
def test_sums_are_exact(shape, pattern, bits, symmetric):
    m, n, k = shape
    x, dense, scale = random(m, k), pruned(n, k, pattern, torch.int8), random(n, seed=1).abs()
    got = run(x, dense, pattern, scale, act_bits=bits, act_symmetric=symmetric, out_dtype=torch.int32)
    assert torch.equal(got, int8_linear.reference(x, dense, scale, None, None, bits, symmetric, "none", torch.int32))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("dtype", "weight_dtype"), [(torch.float32, torch.float32), (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32), slow(torch.bfloat16, torch.bfloat16),
    slow(torch.float32, torch.float16)])  # fmt: skip
@pytest.mark.parametrize("shape", [SHAPES[i] for i in (1, 3)] + [slow(SHAPES[i]) for i in (0, 5)])
def test_floats(shape, pattern, dtype, weight_dtype):
    m, n, k = shape
    x, dense, bias = random(m, k, dtype=dtype), pruned(n, k, pattern, weight_dtype), random(n, seed=2)
    got = run(x, dense, pattern, bias=bias, out_dtype=torch.float32)
    expected = x.double() @ dense.double().mT + bias.double()
    torch.testing.assert_close(got.double(), expected, rtol=3e-6, atol=3e-6)
    assert run(x, dense, pattern, bias=bias).dtype == dtype


@pytest.mark.parametrize("activation", ["none", slow("relu"), "gelu", slow("silu")])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("m", [3, slow(40)])
def test_epilogue(m, pattern, activation):
    n, k = 33, 70
    x, bias, residual = random(m, k, dtype=torch.bfloat16), random(n, seed=5), random(m, n, seed=6).bfloat16()
    dense, scale = pruned(n, k, pattern, torch.int8), random(n, seed=1).abs() * 0.01
    options = {"bias": bias, "activation": activation, "residual": residual}
    got = run(x, dense, pattern, scale, **options)
    expected = int8_linear.reference(x, dense, scale, bias, None, 8, True, activation, None, residual)
    assert (got.double() - expected.double()).abs().max() <= 8e-3 * expected.abs().max()
    floats = dense.bfloat16() / 64
    got = run(x, floats, pattern, **options)
    expected = int8_linear.activate(x.double() @ floats.double().mT + bias.double(), activation) + residual.double()
    assert (got.double() - expected).abs().max() <= 8e-3 * expected.abs().max()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("m", [2, 40])
def test_rows_that_are_not_finite(m, pattern):
    x, scale = random(m, 64), torch.ones(40)
    x[0, 3], x[-1, 0] = math.nan, -math.inf
    for dense, step in ((pruned(40, 64, pattern, torch.float32), None), (pruned(40, 64, pattern, torch.int8), scale)):
        got = run(x, dense, pattern, step)
        assert torch.equal(got.isnan().all(1), ~x.isfinite().all(1))
        assert torch.equal(got.isnan().any(1), ~x.isfinite().all(1))


@pytest.mark.parametrize(
    "tile", [TileConfig(16, 16, 32, split=3), TileConfig(32, 32, 64), TileConfig(64, 16, 128, group=2)]
)
@pytest.mark.parametrize("k", [slow(256), 300])
def test_tiles_of_two_four(tile, k):
    m = 12 if tile.split > 1 else 100
    dense, scale = pruned(50, k, "2:4", torch.int8), torch.rand(50)
    got = run(random(m, k), dense, "2:4", scale, tile=tile, out_dtype=torch.int32)
    expected = int8_linear.reference(random(m, k), dense, scale, None, None, 8, True, "none", torch.int32)
    assert torch.equal(got, expected)
    floats = pruned(50, k, "2:4", torch.float32)
    got = run(random(m, k), floats, "2:4", tile=tile)
    torch.testing.assert_close(got, random(m, k) @ floats.mT, rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize("pattern", ["8x8", "16x4", "64x16"])
def test_other_blocks(pattern):
    dense, scale = pruned(70, 90, pattern, torch.int8, 0.5), torch.rand(70)
    x = random(5, 90)
    got = run(x, dense, pattern, scale, out_dtype=torch.int32)
    assert torch.equal(got, int8_linear.reference(x, dense, scale, None, None, 8, True, "none", torch.int32))


def int4_weights(n, k, group, pattern, density=0.3, scale_dtype=torch.float16):
    dense = pruned(n, k, pattern, torch.int8, density) >> 4  # -8 … 7
    groups = -(-k // group)
    scale = (torch.rand(n, groups, generator=torch.Generator().manual_seed(1)) * 0.02 + 0.001).to(scale_dtype)
    return dense, scale


def run_int4(x, dense, scale, group, pattern, guard=None, **options):
    packed = pack_sparse(dense, pattern, scale=scale, bits=4, group_size=group)
    (n, k), size = dense.shape, tuple(map(int, pattern.split("x")))
    assert int4.unsupported(pattern, k, group) is None
    grid = (-(-n // size[0]), -(-k // size[1]))
    mask = decode_index(packed.index, packed.index_kind, grid[0] * grid[1]).view(grid)
    kept = block_rows(mask, group // size[1] if group < k else None)
    values = packed.values
    if guard is not None:
        kept = type(kept)(*(guarded(t, guard) for t in kept))
        x, values, scale = guarded(x, guard), guarded(values, guard), guarded(scale, guard)
    return int4.int4_sparse_linear(x, values, kept, scale, size, **options)


@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (7, False)])
@pytest.mark.parametrize("pattern", ["8x4", "16x16"])
@pytest.mark.parametrize("shape", [(1, 1, 1, 32), (1, 40, 300, 64), (2, 5, 0, 32), (0, 4, 4, 32), (17, 33, 131, 32),
    (40, 24, 200, 256)])  # fmt: skip
def test_sparse_int4(shape, pattern, bits, symmetric):
    m, n, k, group = shape
    dense, scale = int4_weights(n, k, group, pattern, 0.6, torch.float32 if m == 17 else torch.float16)
    x, bias = random(m, k), random(n, seed=4)
    nibbles = pack_int4((dense + 8).to(torch.uint8))
    for step, offset in ((torch.ones_like(scale), None), (scale, bias)):
        got = run_int4(x, dense, step, group, pattern, bias=offset, act_bits=bits, act_symmetric=symmetric)
        options = (bits, symmetric, "none", None, None)
        expected = int4_linear.reference(x, nibbles, step, None, offset, None, group, *options)
        if offset is None:
            assert torch.equal(got, expected)
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("m", [1, slow(40)])
def test_nothing_is_read_out_of_bounds(m, pattern):
    def everything(at_start):
        for n, k in ((17, 75), (32, 128)):
            for dtype in (torch.int8, torch.float32):
                dense, scale = pruned(n, k, pattern, dtype), torch.ones(n) if dtype == torch.int8 else None
                run(random(m, k), dense, pattern, scale, at_start, act_bits=7, act_symmetric=False)
            if pattern != "2:4":
                run_int4(random(m, k), *int4_weights(n, k, 32, pattern), 32, pattern, at_start)

    assert outcome(lambda: everything(False)) == "ok"
    assert outcome(lambda: everything(True)) == "ok"


def test_unsupported_says_why():
    assert "4x4" in blocks.unsupported("4x4", torch.int8)
    assert "2:4" in blocks.unsupported("2:4", torch.int8)
    assert "float64" in blocks.unsupported("8x4", torch.float64)
    assert "1:4" in two_four.unsupported("1:4", torch.int8)
    assert "uint8" in two_four.unsupported("2:4", torch.uint8)
    assert "unstructured" in int4.unsupported("unstructured", 64, 32)
    assert "24" in int4.unsupported("16x16", 64, 24)
