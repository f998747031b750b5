"""The ops of sparse weights and `SparseLinear` with the `triton` backend forced, in Triton's interpreter: hostile
shapes and values, guard pages, and a module that chooses among the layouts of a GPU."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import triton_cases

triton_cases.require()
for folder in ("ops", "nn"):
    sys.path.append(str(Path(__file__).parent.parent / folder))
import int4_sparse_cases  # noqa: E402
import sparse_cases  # noqa: E402
import sparse_layers  # noqa: E402
from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton import block_sparse_linear, int4_sparse_linear, two_four_linear  # noqa: E402
from tcompress.kernels.triton.int4_sparse_layout import PATTERNS as INT4_PATTERNS  # noqa: E402
from tcompress.kernels.triton.sparse_layout import FLOAT_LAYOUTS, INT8_LAYOUTS, TWO_FOUR  # noqa: E402

from tcompress import Scheme, backend, explain, ops, use_backend  # noqa: E402
from tcompress.nn import SparseLinear  # noqa: E402
from tcompress.ops._registry import OPS  # noqa: E402
from tcompress.sparse_kernel import kernels_for  # noqa: E402

LAYOUTS = ("gpu-2:4", "gpu-8x4", "gpu-16x16", "gpu-32x16")
LIMITS = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def _forced():
    with use_backend("triton"):
        yield


def slow(value):
    return pytest.param(value, marks=pytest.mark.slow)


def packed_of(n, k, layout, dtype=torch.int8):
    return ops.sparse_prepack(sparse_cases.gpu_weight(n, k, dtype, layout), layout)


def agree(op, *arguments):
    """The kernel's result, which is near the reference's: integers bit for bit."""
    got, expected = backend.call(op, *arguments), OPS[op].reference(*arguments)
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    if got.dtype == torch.int32:
        assert torch.equal(got, expected)
    else:
        limit = LIMITS[got.dtype]
        torch.testing.assert_close(got.double(), expected.double(), rtol=limit, atol=limit, equal_nan=True)
    return got


# ---- shapes and values ----------------------------------------------------------------------------------------------

SHAPES = [(0, 16, 8), (1, 0, 8), (3, 17, 0), (1, 1, 1), (1, 70, 515), (15, 31, 33), (16, 32, 64), (17, 33, 65)]
SLOW_SHAPES = [(2, 5, 3), (65, 48, 127), (129, 97, 131), (32, 64, 256)]


@pytest.mark.parametrize("scheme", [(8, True), (7, False), slow((2, True))])
@pytest.mark.parametrize("shape", [*SHAPES, *(slow(shape) for shape in SLOW_SHAPES)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_are_exact(layout, shape, scheme):
    m, n, k = shape
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
    agree("int8_sparse_linear", x, packed_of(n, k, layout), torch.ones(n), None, layout, *scheme, "none", torch.int32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_at_their_bounds(layout):
    """All activations and weights at the ends of their ranges, and as long as sums get in the interpreter's time."""
    n, k = 9, 2048
    weight = torch.full((n, k), -128, dtype=torch.int8)
    if layout == "gpu-2:4":
        weight.view(n, -1, 4)[..., 1:3] = 0
    packed = ops.sparse_prepack(weight, layout)
    x = torch.ones(3, k)
    x[1], x[2, ::2] = -1, -1
    for scheme in ((8, True), (7, False)):
        agree("int8_sparse_linear", x, packed, torch.ones(n), None, layout, *scheme, "none", torch.int32)


def hostile(m, k, dtype):
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(k))
    x[1], x[2, 3], x[3, 0], x[4, -1], x[5, 5] = 0.0, math.nan, math.inf, -math.inf, 3e4
    x[6] = -x[6].abs()
    return x.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, slow(torch.float16), torch.bfloat16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_hostile_values(layout, dtype):
    n, k = 33, 70
    x, scale, bias = hostile(8, k, dtype), torch.rand(n) * 0.01, torch.randn(n)
    y = agree("int8_sparse_linear", x, packed_of(n, k, layout), scale, bias, layout, 8, True, "silu", torch.float32)
    assert torch.equal(y.isnan().all(1), ~x.isfinite().all(1))
    x = hostile(8, k, dtype) / 1e3  # a float sum of 3e4 has no places left for the others
    floats = sparse_cases.SUFFIXES[dtype]
    weight = packed_of(n, k, layout + floats, dtype)
    y = agree("sparse_linear", x, weight, n, bias, layout + floats, "relu", torch.float32)
    assert torch.equal(y.isnan().all(1), ~x.isfinite().all(1))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    n, k = 17, 40
    packed, floats = packed_of(n, k, layout), packed_of(n, k, layout, torch.float32)
    wide = torch.randn(6, 2 * k, generator=torch.Generator().manual_seed(0))
    for x in (wide[:, ::2], wide[:, :k].t().contiguous().t(), wide[:1, :k].expand(3, k), wide[:, :k].view(2, 3, k)):
        agree("int8_sparse_linear", x, packed, torch.ones(n), None, layout, 8, True, "none", torch.int32)
        agree("sparse_linear", x, floats, n, None, layout, "none", None)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_is_read_out_of_bounds(layout):
    """x and the packed weight end, or begin, at a page that cannot be read."""
    x = torch.randn(3, 75, generator=torch.Generator().manual_seed(0))
    packed, floats = packed_of(33, 75, layout), packed_of(33, 75, layout, torch.float32)

    def everything(at_start):
        data = guarded(x, at_start)
        options = ("none", None, None)
        ops.int8_sparse_linear(data, guarded(packed, at_start), torch.ones(33), None, layout, 7, False, *options)
        ops.sparse_linear(data, guarded(floats, at_start), 33, None, layout, *options)

    assert outcome(lambda: everything(False)) == "ok"
    assert outcome(lambda: everything(True)) == "ok"


@pytest.mark.parametrize("scheme", [(8, True), (7, False)])
@pytest.mark.parametrize("layout", int4_sparse_cases.GPU_LAYOUTS)
def test_four_bits(layout, scheme):
    """Scales of 1 make the float sums of groups exact."""
    for n, k, group_size in ((33, 131, 32), (17, 70, 65536), (1, 1, 64)):
        weight = int4_sparse_cases.weight(n, k)
        packed = ops.int4_sparse_prepack(weight, torch.ones(n, -(-k // group_size)), group_size, layout)
        for m in (1, 17):
            x = torch.randn(m, k, generator=torch.Generator().manual_seed(m))
            options = (group_size, torch.float32, *scheme, "none", None, None, layout)
            got = backend.call("int4_sparse_linear", x, packed, n, None, *options)
            assert torch.equal(got, OPS["int4_sparse_linear"].reference(x, packed, n, None, *options))


# ---- which layouts there are ----------------------------------------------------------------------------------------


def test_every_layout_has_a_kernel():
    """What the bindings declare by name is what the kernels take."""
    for pattern, dtype in (*FLOAT_LAYOUTS.values(), *INT8_LAYOUTS.values()):
        kernel = two_four_linear if pattern == TWO_FOUR else block_sparse_linear
        assert kernel.unsupported(pattern, dtype) is None
    for pattern in INT4_PATTERNS:
        assert all(int4_sparse_linear.unsupported(pattern, 4096, group) is None for group in (32, 64, 128, 256, 512))


@pytest.mark.parametrize(
    ("op", "reason"),
    [("int8_sparse_linear", "layout '8x4': the Triton kernels read"), ("sparse_linear", "layout '8x4': the Triton")],
)
def test_the_layouts_of_the_cpu_are_refused(op, reason):
    arguments = next(a for a in sparse_cases.SAMPLES[op] if "8x4" in a)
    with pytest.raises(RuntimeError, match=reason):
        backend.call(op, *arguments)


# ---- the module -----------------------------------------------------------------------------------------------------

MODULES = [(scheme, pattern) for scheme in (None, "W8A8", "W7A7") for pattern in ("2:4", "8x4", "16x16")]


def module_of(scheme, pattern, layout="auto", n=29, k=72, dtype=torch.float32):
    linear = sparse_layers.pruned(n, k, pattern, dtype=dtype)
    return linear, SparseLinear.from_linear(linear, scheme, layout=layout)


def assert_as_the_reference(module, x):
    got = module(x)
    with use_backend("reference"):
        torch.testing.assert_close(got, module(x), rtol=LIMITS[x.dtype], atol=LIMITS[x.dtype])


@pytest.mark.parametrize(("scheme", "pattern"), MODULES)
def test_candidates(scheme, pattern):
    linear, module = module_of(scheme, pattern)
    weight = linear.weight.detach() if scheme is None else module.packed.integers()
    expected = ["dense", *LAYOUTS[pattern != "2:4" :]]
    assert [kernel.layout for kernel in kernels_for(weight, scheme and Scheme.named(scheme))] == expected
    assert module.choice.source == "model: no GPU to measure on"
    assert set(module.choice.seconds) == set(expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("scheme", "pattern"), MODULES)
def test_module(scheme, pattern, dtype):
    suffix = "" if scheme else sparse_cases.SUFFIXES[dtype]
    linear, module = module_of(scheme, pattern, f"gpu-{pattern}{suffix}", dtype=dtype)
    assert module.layout == f"gpu-{pattern}{suffix}"
    assert_as_the_reference(module, sparse_layers.tokens(5, 72, dtype=dtype))
    explanation = explain(module)
    assert explanation.backend == "triton"
    assert [(c.name, c.reason) for c in explanation.candidates] == [(module.layout, "given")]
    with use_backend(None):
        on_cpu = SparseLinear.from_linear(linear, scheme, layout="dense").state_dict()
    state = module.state_dict()  # the layout is the device's, and not saved
    assert state.keys() == on_cpu.keys()
    assert all(torch.equal(value, on_cpu[key]) for key, value in state.items())
    module.load_state_dict(on_cpu)
    assert module._kernel.layout == module.layout


@pytest.mark.parametrize(("scheme", "pattern"), MODULES[1:5])
def test_compile(scheme, pattern):
    torch._dynamo.reset()
    module = module_of(scheme, pattern, f"gpu-{pattern}")[1]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (3, 5):
            x, residual = sparse_layers.tokens(rows, 72), sparse_layers.tokens(rows, 29)
            assert torch.equal(compiled(x, residual), module(x, residual))


@pytest.mark.parametrize("scheme", [None, "W8A8"])
def test_a_layer_of_the_cpu_chooses_anew(scheme):
    """As a layer that moves to a GPU does: its layout is not among those that run there."""
    with use_backend(None):
        linear, module = module_of(scheme, "16x16", "8x4", n=64, k=128)
        state = module.state_dict()
    module.load_state_dict(state)
    assert module.layout == "8x4"
    assert module._kernel.layout in ("dense", "gpu-8x4", "gpu-16x16", "gpu-32x16")
    assert_as_the_reference(module, sparse_layers.tokens(5, 128))
    assert all("model: no GPU to measure on" in c.reason for c in explain(module).candidates)
    with use_backend(None):
        module.load_state_dict(state)
        assert module._kernel.layout == "8x4"
        sparse_layers.assert_computes(module, linear, sparse_layers.tokens(5, 128))
