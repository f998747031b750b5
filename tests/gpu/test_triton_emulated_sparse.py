"""The Triton kernels of sparse weights as compiled for 8.0 and 8.9, run in the PTX emulator from the ops' layouts: sums
bit for bit. The emulator's checks of memory, races and copies hold throughout: no kernel reads what lies between two
parts of a packed weight. Numbers of tokens that fill the tiles of the wide kernels, for these read panels that nobody
wrote, of tokens that they do not store."""

from __future__ import annotations

import math

import pytest
import torch
import triton_cases

triton_cases.require_compiler()

from emulated import emulated  # noqa: E402
from tcompress.kernels.triton import block_sparse_linear, int4_sparse_linear, two_four_linear  # noqa: E402, F401
from tcompress.kernels.triton.bindings import KERNELS  # noqa: E402

from tcompress.ops._registry import OPS  # noqa: E402

F32 = torch.float32


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def weight(n, k, layout, dtype=torch.int8):
    """What the layout needs, with an empty row of blocks, or quads of fewer than two."""
    generator = torch.Generator().manual_seed(n * k)
    if "2:4" in layout:
        keep = (torch.rand(n, -(-k // 4), 4, generator=generator).argsort(-1) < 2).flatten(1)[:, :k]
        keep = keep & (torch.rand(n, k, generator=generator) < 0.9)
    else:
        blocks = torch.rand(-(-n // 16), -(-k // 16), generator=generator) < 0.6
        blocks[1:2] = False
        keep = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :k]
    dense = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator)
    return (dense if dtype == torch.int8 else torch.randn(n, k, generator=generator).to(dtype)) * keep


def tokens(m, k):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    if m > 2:
        x[1], x[2, -1] = 0, math.nan
    return x


def run(architecture, op, arguments):
    """The kernel's name and its result."""
    with emulated(architecture) as gpu:
        got = KERNELS[op].run(*arguments)
    return gpu.launched[-1].kernel, got


CASES = [  # tokens, layout, architecture
    (1, "gpu-2:4", 80),
    (17, "gpu-2:4", 89),
    (1, "gpu-8x4", 80),
    (16, "gpu-8x4", 89),
    (1, "gpu-16x16", 89),
    slow(16, "gpu-16x16", 80),
    slow(16, "gpu-32x16", 80),
    slow(65, "gpu-2:4", 80),
    slow(64, "gpu-8x4", 80),
    slow(32, "gpu-32x16", 89),
    slow(4, "gpu-32x16", 80),
]


@pytest.mark.parametrize("scheme", [slow((8, True)), (7, False)])
@pytest.mark.parametrize(("m", "layout", "architecture"), CASES)
def test_sums_are_exact(m, layout, architecture, scheme):
    n, k = 40, 75
    packed = OPS["sparse_prepack"].reference(weight(n, k, layout), layout)
    arguments = (tokens(m, k), packed, torch.ones(n), None, layout, *scheme, "none", torch.int32)
    name, got = run(architecture, "int8_sparse_linear", arguments)
    assert name == ("two_four" if "2:4" in layout else "block_sparse_narrow" if m <= 4 else "block_sparse")
    assert torch.equal(got, OPS["int8_sparse_linear"].reference(*arguments))


@pytest.mark.parametrize("layout", ["gpu-2:4", "gpu-8x4", "gpu-16x16-float16", slow("gpu-2:4-float16")])
@pytest.mark.parametrize("m", [1, slow(16)])
def test_floats(layout, m):
    n, k = 24, 70
    dtype = torch.float16 if layout.endswith("float16") else F32
    packed = OPS["sparse_prepack"].reference(weight(n, k, layout, dtype), layout)
    x, bias = tokens(m, k).to(dtype), torch.randn(n, generator=torch.Generator().manual_seed(0))
    arguments = (x, packed, n, bias, layout, "relu", F32)
    _, got = run(80, "sparse_linear", arguments)
    torch.testing.assert_close(got, OPS["sparse_linear"].reference(*arguments), rtol=4e-6, atol=4e-6, equal_nan=True)


@pytest.mark.parametrize("scheme", [slow((8, True)), (7, False)])
@pytest.mark.parametrize(
    ("m", "layout"), [(1, "gpu-8x4"), (16, "gpu-16x16"), slow(16, "gpu-8x4"), slow(2, "gpu-16x16")]
)
def test_four_bits(m, layout, scheme):
    """Scales of 1 make the float sums of groups exact."""
    n, k, group_size = 24, 75, 32
    w = weight(n, k, layout) >> 4
    packed = OPS["int4_sparse_prepack"].reference(w, torch.ones(n, 3), group_size, layout)
    arguments = (tokens(m, k), packed, n, None, group_size, F32, *scheme, "none", None, None, layout)
    launched, got = run(80, "int4_sparse_linear", arguments)
    expected = OPS["int4_sparse_linear"].reference(*arguments)
    assert launched == ("block_sparse_narrow" if m <= 4 else "int4_block_sparse")
    assert torch.equal(got.nan_to_num(), expected.nan_to_num())
    assert torch.equal(got.isnan(), expected.isnan())
