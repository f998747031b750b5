"""The numbers of `int4_linear`: integers bit for bit against int64, on every CPU path and in the reference; floats
against float64 and what torch makes of the dequantized operands."""

from functools import cache

import cases
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int4_linear"]
W4A8, W4A7, WEIGHT_ONLY = cases.W8A8, cases.W8A7, (None, True)
INTEGERS = (W4A8, W4A7, (2, True), (2, False))
RUNNERS = (*cases.CPU_PATHS, "reference")
SHAPES = {str(shape): shape for shape in cases.SHAPES}
# Rows on both sides of what the paths multiply straight from packed weights (4), in tiles of 6, 8 and 16; outputs off
# 16 and 48; K off 8, 32 and the group; more than one chunk of K (512, or 128 in floats).
ROWS = {
    f"rows-{m}": [cases.Shape("rows", m, n, k) for n, k in ((1, 33), (17, 40), (49, 97), (97, 130), (50, 1063))]
    for m in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65)
}
ALL_SHAPES = {name: [shape] for name, shape in SHAPES.items()} | ROWS
SMALL = [name for name, shape in SHAPES.items() if shape.m * shape.n * shape.k < 2**18]


def run(runner, x, w, bias=None, scheme=W4A8, activation="none", out_dtype=None, residual=None, kernel_weight=None):
    """runner: a CPU path, or "reference"."""
    arguments = (x, *w.operands, bias, kernel_weight, w.group_size, *scheme, activation, out_dtype, residual)
    if runner == "reference":
        return OP.reference(*arguments)
    with use_backend("cpu"), use_cpu_path(runner):
        return ops.int4_linear(*arguments)


@cache
def activations(m, k, dtype=torch.float32):
    return cases.INPUTS["normal"](m, k, dtype)


@cache
def quantized(m, k, scheme):
    return oracle.quantize(activations(m, k).numpy(), *scheme)


def exact_result(q, w):
    """float32(Σ_g acc · weight_scale) · scale, where float32 holds every sum."""
    integers, scale, zero_point = q
    units = (2 * w.of_columns(w.scale).double()).long()  # scales are multiples of 1/2
    acc = oracle.accumulate(integers, zero_point, w.integers() * units)
    assert (acc.astype(np.float32) == acc).all()
    with np.errstate(over="ignore"):
        return torch.from_numpy(acc.astype(np.float32) / 2 * scale[:, None])


@cache
def weight(n, k, group_size, scale_dtype, zeros, scale="powers"):
    return cases.int4_weight(cases.random_int4(n, k), group_size, scale_dtype, zeros, scale)


KINDS = (
    (32, torch.float16, "random"),
    (32, torch.float32, None),
    (64, torch.float32, "random"),
    (128, torch.float16, None),
    (512, torch.float16, "random"),
    (cases.PER_CHANNEL, torch.float32, "random"),
    (cases.PER_CHANNEL, torch.float16, None),
)


@cache
def expected_integers(shape, kind, scheme):
    return exact_result(quantized(shape.m, shape.k, scheme), weight(shape.n, shape.k, *kind))


# ---- integers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shapes", ALL_SHAPES)
def test_integers_are_exact_on_every_shape(runner, shapes):
    for shape in ALL_SHAPES[shapes]:
        large = shape.m * shape.n * shape.k >= 2**21
        for kind in KINDS[::3] if large or shapes in ROWS else KINDS:
            for scheme in INTEGERS[:2] if large else INTEGERS:
                got = run(runner, activations(shape.m, shape.k), weight(shape.n, shape.k, *kind), scheme=scheme)
                assert oracle.same_bits(got, expected_integers(shape, kind, scheme)), (shape, kind, scheme)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("scheme", cases.LINEAR_SCHEMES, ids=str)
def test_integers_are_exact_with_any_number_of_bits(runner, scheme):
    for m in (3, 21):
        shape = cases.Shape("bits", m, 50, 75)
        for kind in KINDS[:2]:
            got = run(runner, activations(m, 75), weight(50, 75, *kind), scheme=scheme)
            assert oracle.same_bits(got, expected_integers(shape, kind, scheme)), (runner, kind)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("x_type", cases.DTYPES)
@pytest.mark.parametrize("out_dtype", [*cases.DTYPES, None])
def test_integers_are_exact_in_every_type(runner, x_type, out_dtype):
    for m in (3, 21):
        x = activations(m, 75, x_type)
        for scheme in (W4A8, W4A7):
            w = weight(50, 75, *KINDS[0])
            expected = exact_result(oracle.quantize(oracle.to_float32(x), *scheme), w).to(out_dtype or x_type)
            assert oracle.same_bits(run(runner, x, w, scheme=scheme, out_dtype=out_dtype), expected)


@cache
def at_bounds(m, k):
    """Rows with every element at a bound, in patterns that weights can have the signs of."""
    i = torch.arange(k)
    patterns = [torch.ones(k), (-1.0) ** i, (-1.0) ** (i // 4), (-1.0) ** (i // 2), (-1.0) ** (i // 32)]
    rows = torch.stack([sign * pattern for pattern in patterns for sign in (1, -1)])
    return rows.repeat(m // len(rows) + 1, 1)[:m].contiguous()


@cache
def problem_at_bounds(name, m, n, k, group_size, zeros, scheme):
    """A weight, and what `at_bounds(m, k)` gives."""
    w = cases.int4_weight(cases.INT4_WEIGHTS[name](n, k), group_size, torch.float16, zeros, 1.0)
    return w, exact_result(oracle.quantize(at_bounds(m, k).numpy(), *scheme), w)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", cases.INT4_WEIGHTS)
@pytest.mark.parametrize("zeros", [None, 0, 15])
def test_integers_are_exact_at_their_bounds(runner, name, zeros):
    """AVX2 adds 8 steps of two products of 15 · 127 in 16 bits, less the zero point's part, which is as large."""
    for m, n, k in ((2, 49, 32), (4, 97, 256), (10, 49, 100), (17, 50, 544), (33, 97, 64)):
        for group_size in (32, 128, cases.PER_CHANNEL):
            for scheme in (W4A8, W4A7, (2, True)):
                w, expected = problem_at_bounds(name, m, n, k, group_size, zeros, scheme)
                got = run(runner, at_bounds(m, k), w, scheme=scheme)
                assert oracle.same_bits(got, expected), (m, n, k, group_size, scheme)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize(("name", "zeros"), [("all 15", 0), ("all 0", 15), ("0 and 15", None), ("0 and 15", 0)])
def test_longest_sum_at_its_bounds(runner, name, zeros):
    """K = 65536; every span's sum is a multiple of 16 · 127, so that float32 holds their sums too."""
    k = 65536
    for m in (2, 7):
        for group_size in (512, cases.PER_CHANNEL):
            w, expected = problem_at_bounds(name, m, 3, k, group_size, zeros, W4A8)
            assert oracle.same_bits(run(runner, at_bounds(m, k), w), expected), (m, group_size)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_integers_are_exact_on_hostile_inputs(runner, name):
    for m, n, k in ((1, 17, 1), (7, 49, 37), (21, 50, 70)):
        w = weight(n, k, *KINDS[0])
        for dtype in cases.DTYPES:
            x = cases.INPUTS[name](m, k, dtype)
            for scheme in (W4A8, W4A7):
                expected = exact_result(oracle.quantize(oracle.to_float32(x), *scheme), w)
                got = run(runner, x, w, scheme=scheme, out_dtype=torch.float32)
                assert oracle.same_bits(got, expected), (m, dtype, scheme)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("scheme", [W4A8, W4A7], ids=str)
def test_integers_of_a_row_do_not_depend_on_other_rows(runner, scheme):
    x, w = activations(40, 200), weight(50, 200, *KINDS[0])
    together = run(runner, x, w, scheme=scheme)
    for i in range(40):
        assert oracle.same_bits(run(runner, x[i : i + 1], w, scheme=scheme), together[i : i + 1]), i


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", [(150, 97, 1063), (1, 1025, 600), (5, 300, 800)], ids=str)
def test_integers_do_not_depend_on_the_number_of_threads(path, shape):
    shape = cases.Shape("threads", *shape)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            got = run(path, activations(shape.m, shape.k), weight(shape.n, shape.k, *KINDS[0]))
            assert oracle.same_bits(got, expected_integers(shape, KINDS[0], W4A8)), threads
    finally:
        torch.set_num_threads(before)


# ---- floats: error against float64 ----------------------------------------------------------------------------------


class Accuracy:
    """Exact results, and torch's own from dequantized float32 operands.

    `few`: below this many results the largest error of torch may happen to be small; theirs is then held to the bound
    of any order of summation."""

    few = 16

    def __init__(self, x, w, bias, scheme, residual=None):
        a, scale = oracle.to_float32(x), np.ones((1, 1), np.float32)
        if scheme[0] is not None:
            q, scale, zero_point = oracle.quantize(a, *scheme)
            a, scale = (q - zero_point[:, None]).astype(np.float32), scale[:, None]
        rows, factor = torch.from_numpy(a), torch.from_numpy(scale)
        shape = (*x.shape[:-1], len(w.scale))
        exact_w = w.dequantized(torch.float64)
        exact = (rows.double() * factor.double()) @ exact_w.t()
        magnitude = (rows.double() * factor.double()).abs() @ exact_w.abs().t()
        magnitude += 0 if bias is None else bias.double().abs()
        self.bound = (x.shape[-1] + w.scale.shape[1] + 3) * oracle.HALF_ULP * magnitude.reshape(shape)
        self.exact = (exact if bias is None else exact + bias.double()).reshape(shape)
        bias = None if bias is None else bias.float()
        self.by_torch = F.linear(rows * factor, w.dequantized(torch.float32), bias).reshape(shape)
        self.residual = residual

    def check(self, got, activation="none", what=""):
        if self.exact.numel() < self.few and activation == "none" and self.residual is None:
            rounding = self.exact.abs() * torch.finfo(got.dtype).eps
            assert ((got.double() - self.exact).abs() <= self.bound + rounding).all(), what
            return
        exact = oracle.activate_float64(self.exact, activation)
        by_torch = oracle.activate_float32(self.by_torch, activation)
        if self.residual is not None:
            exact, by_torch = exact + self.residual.double(), by_torch + self.residual.float()
        oracle.assert_accurate(got, by_torch.to(got.dtype), exact, OP.tolerance, what)


@cache
def float_operands(shape, group_size, dtype):
    """x, weight and bias."""
    scale_dtype, zeros = (torch.float16, "random") if group_size == 32 else (torch.float32, None)
    bias = torch.randn(shape.n, generator=cases.generator(shape))
    w = weight(shape.n, shape.k, group_size, scale_dtype, zeros, None)
    return activations(shape.m, shape.k, dtype), w, bias


@cache
def accuracy(shape, group_size, dtype, scheme):
    x, w, bias = float_operands(shape, group_size, dtype)
    return Accuracy(x, w, bias, scheme)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shapes", ALL_SHAPES)
def test_accuracy_on_every_shape(runner, shapes):
    for shape in ALL_SHAPES[shapes]:
        for dtype in (torch.float32,) if shapes in ROWS else cases.DTYPES:
            for group_size in (32, 128, cases.PER_CHANNEL) if dtype == torch.float32 else (32,):
                x, w, bias = float_operands(shape, group_size, dtype)
                for scheme in (W4A8, W4A7, WEIGHT_ONLY):
                    got = run(runner, x, w, bias, scheme)
                    accuracy(shape, group_size, dtype, scheme).check(got, what=(shape, dtype, group_size, scheme))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("scheme", [W4A8, W4A7, WEIGHT_ONLY], ids=["W4A8", "W4A7", "weight-only"])
def test_activation_residual_and_types(runner, activation, scheme):
    for m in (3, 21):
        shape = cases.Shape("activated", m, 50, 75)
        x, w, bias = float_operands(shape, 32, torch.float32)
        for out_dtype in cases.DTYPES:
            for residual in (None, activations(m, 50).to(out_dtype)):
                for b in (None, bias.to(out_dtype)):
                    got = run(runner, x, w, b, scheme, activation, out_dtype, residual)
                    Accuracy(x, w, b, scheme, residual).check(got, activation, (m, out_dtype, b is None))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("name", ["outlier", "negatives", "zeros", "zero-rows", "1e-38", "constant", "halves"])
def test_weight_only_accuracy_on_hostile_inputs(runner, name):
    for m, n, k in ((2, 49, 37), (13, 50, 300)):
        for zeros in (None, "random", 0, 15):
            w = weight(n, k, 64, torch.float16, zeros, None)
            for dtype in cases.DTYPES:
                x = cases.INPUTS[name](m, k, dtype)
                got = run(runner, x, w, None, WEIGHT_ONLY, out_dtype=torch.float32)
                Accuracy(x, w, None, WEIGHT_ONLY).check(got, what=(m, zeros, dtype))


# ---- rows that are not finite ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("m", [2, 11, 37])
def test_non_finite_row_harms_no_other(runner, value, m):
    """With quantized activations it is NaN; weight-only it is what torch makes of it."""
    clean, bias = activations(m, 75), torch.randn(50, generator=cases.generator("bias"))
    spoilt = torch.zeros(m, dtype=torch.bool)
    spoilt[[0, m // 2]] = True
    x = clean.clone()
    x[0, 0] = x[m // 2, 74] = value
    for kind in KINDS[:2]:
        w = weight(50, 75, *kind, None)
        for scheme in (W4A8, W4A7, WEIGHT_ONLY):
            got, undisturbed = run(runner, x, w, bias, scheme), run(runner, clean, w, bias, scheme)
            assert oracle.same_bits(got[~spoilt], undisturbed[~spoilt]), scheme
            assert undisturbed.isfinite().all()
            if scheme == WEIGHT_ONLY:
                by_torch = F.linear(x, w.dequantized(torch.float32), bias)[spoilt]
                assert torch.equal(got[spoilt].nan_to_num(1, 2, 3), by_torch.nan_to_num(1, 2, 3))
            else:
                assert got[spoilt].isnan().all()


# ---- layouts, optional arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("scheme", [W4A8, W4A7, WEIGHT_ONLY], ids=["W4A8", "W4A7", "weight-only"])
def test_every_layout_of_x(runner, layout, scheme):
    w, bias = weight(19, 75, *KINDS[0], None), torch.randn(19, generator=cases.generator("bias"))
    for dtype in cases.DTYPES:
        x = cases.LAYOUTS[layout](activations(6, 75, dtype))
        dense = x.resolve_neg().contiguous().clone()
        got = run(runner, x, w, bias, scheme)
        assert got.shape == (*x.shape[:-1], 19)
        assert got.is_contiguous()
        if (runner, scheme) != ("reference", WEIGHT_ONLY):  # whose sums are torch's, which look at strides
            assert oracle.same_bits(got, run(runner, dense, w, bias, scheme)), dtype
        Accuracy(dense, w, bias, scheme).check(got)


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("shape", SMALL)
def test_kernel_weight_takes_the_place_of_weight(runner, shape):
    """Its scales and zero points too: of the others only shape and type count."""
    shape = SHAPES[shape]
    for kind in KINDS:
        w = weight(shape.n, shape.k, *kind, None)
        packed = ops.int4_prepack(*w.operands, shape.k, w.group_size)
        zeros = None if w.zero_point is None else torch.full_like(w.zero_point, 255)
        empty = cases.Int4Weight(w.q, None, torch.full_like(w.scale, float("nan")), zeros, w.group_size)
        for scheme in (W4A7, WEIGHT_ONLY):
            x = activations(shape.m, shape.k)
            expected = run(runner, x, w, scheme=scheme)
            assert oracle.same_bits(run(runner, x, w, scheme=scheme, kernel_weight=packed), expected)
            assert oracle.same_bits(run(runner, x, empty, scheme=scheme, kernel_weight=packed), expected)


@pytest.mark.parametrize("runner", RUNNERS)
def test_every_layout_of_the_other_operands(runner):
    for m in (3, 21):
        x, w = activations(m, 75), weight(50, 75, *KINDS[0], None)
        bias = torch.randn(50, generator=cases.generator("bias"))
        expected = run(runner, x, w, bias)
        wide = torch.zeros(100, 76, dtype=torch.uint8)
        wide[::2, ::2] = w.weight
        scale, zero_point = w.scale.t().contiguous().t(), w.zero_point.repeat_interleave(2, 1)[:, ::2]
        views = cases.Int4Weight(w.q, wide[::2, ::2], scale, zero_point, w.group_size)
        assert oracle.same_bits(run(runner, x, views, bias.repeat_interleave(2)[::2]), expected)
        for b in (bias.half(), bias.bfloat16(), bias.double()):
            assert oracle.same_bits(run(runner, x, w, b), run(runner, x, w, b.float()))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("scheme", [W4A8, WEIGHT_ONLY], ids=["W4A8", "weight-only"])
@pytest.mark.parametrize("activation", ["none", "silu"])
def test_residual_of_any_strides_is_added_last(runner, scheme, activation):
    for m, n in ((1, 1), (3, 49), (21, 50), (0, 5), (4, 0)):
        x, w = activations(m, 75), weight(n, 75, *KINDS[0], None)
        for dtype in cases.DTYPES:
            plain = run(runner, x, w, None, scheme, activation, torch.float32)
            residual = activations(m, n, dtype)
            expected = (plain + residual.float()).to(dtype)
            for view in cases.residual_views(residual):
                got = run(runner, x, w, None, scheme, activation, dtype, view)
                assert oracle.same_bits(got, expected), (m, dtype, view.stride())
            if m:
                got = run(runner, x, w, None, scheme, activation, dtype, residual[:1].expand(m, n))
                assert oracle.same_bits(got, (plain + residual[:1].float()).to(dtype))


@pytest.mark.parametrize("runner", RUNNERS)
@pytest.mark.parametrize("scheme", [W4A8, W4A7, WEIGHT_ONLY], ids=["W4A8", "W4A7", "weight-only"])
def test_nothing_in_gives_bias_and_nothing_out(runner, scheme):
    bias, residual = torch.randn(17, generator=cases.generator("bias")), activations(3, 17)
    for kind in KINDS:
        assert run(runner, activations(0, 40), weight(17, 40, *kind), bias, scheme).shape == (0, 17)
        assert run(runner, activations(3, 40), weight(0, 40, *kind), None, scheme).shape == (3, 0)
        got = run(runner, activations(3, 0), weight(17, 0, *kind), bias, scheme, residual=residual)
        assert oracle.same_bits(got, bias + residual)
        assert not run(runner, activations(9, 0), weight(17, 0, *kind), None, scheme).any()
