"""The numbers of `int8_linear`: the reference against int64 and float64, every CPU path against both."""

from functools import cache

import cases
import numpy as np
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int8_linear"]
SHAPES = {str(shape): shape for shape in cases.SHAPES}


def run(path, x, weight, scale, bias=None, kernel_weight=None, scheme=cases.W8A8, activation="none", out_dtype=None):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.int8_linear(x, weight, scale, bias, kernel_weight, *scheme, activation, out_dtype)


def reference(x, weight, scale, bias=None, scheme=cases.W8A8, activation="none", out_dtype=None):
    return OP.reference(x, weight, scale, bias, None, *scheme, activation, out_dtype)


@cache
def operands(shape, dtype):
    x, weight, scale, bias = cases.linear_operands(shape, dtype)
    return x, weight, scale, bias, ops.int8_prepack(weight)


@cache
def ordinary_reference(shape, dtype, scheme, out_dtype):
    x, weight, scale, bias, _ = operands(shape, dtype)
    return reference(x, weight, scale, bias, scheme, "none", out_dtype)


class Exact:
    """int64 sums and float64 results, from the quantized rows that the oracle makes of `x`."""

    def __init__(self, x, weight, scale, bias, scheme):
        self.lead = x.shape[:-1]
        q, row_scale, zero_point = oracle.quantize(oracle.to_float32(x), *scheme)
        self.acc = torch.from_numpy(oracle.accumulate(q, zero_point, weight))
        self.row_scale, self.scale = torch.from_numpy(row_scale)[:, None], scale
        self.bias = torch.zeros_like(scale) if bias is None else bias.float()

    def integers(self):
        return (
            self.acc.int().view(*self.lead, -1)
            if self.acc.numel()
            else self.acc.int().view(*self.lead, len(self.scale))
        )

    def before_activation(self):
        return self.acc.double() * self.row_scale.double() * self.scale.double() + self.bias.double()

    def float64(self, activation):
        return self.shaped(oracle.activate_float64(self.before_activation(), activation))

    def by_torch(self, activation, dtype):
        y = self.acc.float() * self.row_scale * self.scale + self.bias
        return self.shaped(oracle.activate_float32(y, activation).to(dtype))

    def rounding_bound(self):
        """Of the reference without activation: the roundings of acc, of two products and of a sum."""
        product = (self.acc.double() * self.row_scale.double() * self.scale.double()).abs()
        return self.shaped(5 * oracle.HALF_ULP * (product + self.bias.double().abs()))

    def shaped(self, y):
        return y.reshape(*self.lead, len(self.scale))


# ---- the reference against int64 and float64 ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_reference_matches_int64_and_float64(shape):
    shape = SHAPES[shape]
    for dtype in cases.DTYPES:
        for scheme in (cases.W8A8, cases.W8A7, (5, True), (3, False)):
            x, weight, scale, bias, _ = operands(shape, dtype)
            exact = Exact(x, weight, scale, bias, scheme)
            got = ordinary_reference(shape, dtype, scheme, torch.int32)
            assert oracle.same_bits(got, exact.integers()), (shape, dtype, scheme)
            got = ordinary_reference(shape, dtype, scheme, torch.float32)
            error = (got.double() - exact.float64("none")).abs()
            assert (error <= exact.rounding_bound()).all(), (shape, dtype, scheme)
            narrow = ordinary_reference(shape, dtype, scheme, None)  # in the type of x: rounded once more
            assert oracle.same_bits(narrow, got.to(dtype))


@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_reference_applies_the_activation_it_names(activation):
    shape = cases.Shape("activated", 9, 50, 30)
    x, weight, scale, bias, _ = operands(shape, torch.float32)
    exact = Exact(x, weight, scale, bias, cases.W8A8)
    got = reference(x, weight, scale, bias, activation=activation)
    # No activation is steeper than 1.13, and torch's own error is a few roundings of its argument.
    bound = 1.13 * exact.rounding_bound() + 8 * oracle.HALF_ULP * exact.shaped(exact.before_activation().abs())
    assert ((got.double() - exact.float64(activation)).abs() <= bound).all()


def test_by_hand():
    # 2 bits: a = [1, 0, -1] with scale 2; acc = [1 - 3, -128 - 127]
    x = torch.tensor([[2.0, 0.5, -2.0]])
    weight = torch.tensor([[1, 2, 3], [-128, 5, 127]], dtype=torch.int8)
    scale, bias = torch.tensor([0.5, 0.25]), torch.tensor([3.0, 100.0])
    for path in cases.CPU_PATHS:
        assert run(path, x, weight, scale, bias, scheme=(2, True), out_dtype=torch.int32).tolist() == [[-2, -255]]
        assert run(path, x, weight, scale, bias, scheme=(2, True)).tolist() == [[1.0, -27.5]]
        assert run(path, x, weight, scale, bias, scheme=(2, True), activation="relu").tolist() == [[1.0, 0.0]]
        # 2 bits with zero point: a - z = [1, 0, -2] with scale 1
        x_asymmetric = torch.tensor([[1.0, 0.5, -2.0]])
        got = run(path, x_asymmetric, weight, scale, None, scheme=(2, False), out_dtype=torch.int32)
        assert got.tolist() == [[1 - 6, -128 - 254]]


# ---- every path against the reference, bit for bit ------------------------------------------------------------------


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_exact_on_every_shape(path, shape):
    shape = SHAPES[shape]
    for dtype in cases.DTYPES:
        x, weight, scale, bias, packed = operands(shape, dtype)
        # Large cases: the schemes of the presets only, the others run on all the small ones.
        for scheme in cases.LINEAR_SCHEMES if shape.m * shape.n * shape.k < 2**18 else (cases.W8A8, cases.W8A7):
            for out_dtype in (torch.int32, None, torch.float32):
                got = run(path, x, weight, scale, bias, packed, scheme, "none", out_dtype)
                expected = ordinary_reference(shape, dtype, scheme, out_dtype)
                assert oracle.same_bits(got, expected), (path, dtype, scheme, out_dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if SHAPES[s].m * SHAPES[s].n * SHAPES[s].k < 2**18])
def test_optional_arguments(path, shape):
    """Without bias, with one of each type, without prepacked weight, with every type of result."""
    x, weight, scale, bias, packed = operands(SHAPES[shape], torch.float32)
    for out_dtype in (*cases.DTYPES, torch.int32, None):
        for b in (None, bias, bias.half(), bias.bfloat16(), bias.double()):
            for kernel_weight in (None, packed):
                got = run(path, x, weight, scale, b, kernel_weight, out_dtype=out_dtype)
                assert oracle.same_bits(got, reference(x, weight, scale, b, out_dtype=out_dtype)), (path, out_dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_bit_exact_on_hostile_inputs(path, name):
    for m, n, k in ((1, 1, 1), (7, 35, 37), (9, 50, 68)):
        scale = torch.rand(n, generator=cases.generator(name)) + 0.01
        for weight_name, make in cases.WEIGHTS.items():
            weight = make(n, k)
            for dtype in cases.DTYPES:
                x = cases.INPUTS[name](m, k, dtype)
                for scheme in (cases.W8A8, cases.W8A7, (2, True), (2, False)):
                    what = (path, name, weight_name, dtype, scheme)
                    got = run(path, x, weight, scale, scheme=scheme, out_dtype=torch.int32)
                    assert oracle.same_bits(got, reference(x, weight, scale, scheme=scheme, out_dtype=torch.int32)), (
                        what
                    )
                    got = run(path, x, weight, scale, scheme=scheme)
                    assert oracle.same_bits(got, reference(x, weight, scale, scheme=scheme)), what


@pytest.mark.parametrize("name", cases.INPUTS)
def test_reference_matches_int64_on_hostile_inputs(name):
    weight, scale = cases.random_weight(35, 37), torch.ones(35)
    for dtype in cases.DTYPES:
        x = cases.INPUTS[name](7, 37, dtype)
        for scheme in cases.LINEAR_SCHEMES:
            exact = Exact(x, weight, scale, None, scheme)
            assert oracle.same_bits(reference(x, weight, scale, scheme=scheme, out_dtype=torch.int32), exact.integers())


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("weight", cases.WEIGHTS)
def test_longest_sum_at_its_bounds(path, weight):
    """K = 65536 with every activation at its largest: the unsigned form multiplies 255 by -128."""
    k = 65536
    w = cases.WEIGHTS[weight](3, k)
    signs = (-1.0) ** torch.arange(k)
    x = torch.stack([torch.ones(k), -torch.ones(k), signs, -signs])
    for scheme in (cases.W8A8, cases.W8A7):
        exact = Exact(x, w, torch.ones(3), None, scheme)
        got = run(path, x, w, torch.ones(3), scheme=scheme, out_dtype=torch.int32)
        assert oracle.same_bits(got, exact.integers()), (path, weight, scheme)
        assert oracle.same_bits(reference(x, w, torch.ones(3), scheme=scheme, out_dtype=torch.int32), exact.integers())


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_bit_exact_on_every_layout_of_x(path, layout):
    weight, bias = cases.random_weight(19, 21), torch.randn(19, generator=cases.generator("bias"))
    scale = torch.rand(19, generator=cases.generator("scale"))
    for dtype in cases.DTYPES:
        x = cases.LAYOUTS[layout](cases.INPUTS["normal"](6, 21, dtype))
        for scheme in (cases.W8A8, cases.W8A7):
            got = run(path, x, weight, scale, bias, scheme=scheme)
            assert got.shape == (*x.shape[:-1], 19)
            assert got.is_contiguous()
            dense = x.resolve_neg().contiguous().clone()
            assert oracle.same_bits(got, reference(dense, weight, scale, bias, scheme)), (path, layout, dtype)
            exact = Exact(x, weight, scale, bias, scheme)
            got = run(path, x, weight, scale, bias, scheme=scheme, out_dtype=torch.int32)
            assert oracle.same_bits(got, exact.integers())


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_bit_exact_on_every_layout_of_the_other_operands(path):
    x, weight, scale, bias, _ = operands(cases.Shape("views", 5, 18, 22), torch.float32)
    expected = reference(x, weight, scale, bias)
    wide = torch.zeros(36, 44, dtype=torch.int8)
    wide[::2, ::2] = weight
    strided_scale = torch.stack([scale, torch.full_like(scale, float("nan"))], 1)[:, 0]
    strided_bias = torch.stack([bias, torch.full_like(bias, float("nan"))], 1)[:, 0]
    for w in (weight.t().contiguous().t(), wide[::2, ::2]):
        assert oracle.same_bits(run(path, x, w, strided_scale, strided_bias), expected)
    constant = torch.tensor([0.5]).expand(18)
    assert oracle.same_bits(run(path, x, weight, constant, constant), reference(x, weight, constant, constant))


# ---- activations: error against float64 -----------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("shape", [s for s in SHAPES if SHAPES[s].m * SHAPES[s].n * SHAPES[s].k < 2**21])
def test_activation_accuracy_on_every_shape(path, activation, shape):
    x, weight, scale, bias, packed = operands(SHAPES[shape], torch.float32)
    exact = Exact(x, weight, scale, bias, cases.W8A8)
    for dtype in cases.DTYPES:
        got = run(path, x, weight, scale, bias, packed, cases.W8A8, activation, dtype)
        by_torch = exact.by_torch(activation, dtype)
        oracle.assert_accurate(got, by_torch, exact.float64(activation), OP.tolerance, (path, dtype))
        if activation == "relu":
            assert torch.equal(got, by_torch)


def activated(path, values, activation, dtype=torch.float32):
    """The activation of exactly `values`: a zero row gives -0 · scale, and the bias does the rest."""
    n = len(values)
    weight, minus_one = torch.zeros(n, 1, dtype=torch.int8), torch.full((n,), -1.0)
    return run(path, torch.zeros(1, 1), weight, minus_one, values, activation=activation, out_dtype=dtype)[0]


def assert_activation_accurate(path, values, activation, dtype):
    exact = oracle.activate_float64(values.double(), activation)
    by_torch = oracle.activate_float32(values, activation).to(dtype)
    what = f"{activation} on {path}, {dtype}, from {values.min():g} to {values.max():g}"
    oracle.assert_accurate(activated(path, values, activation, dtype), by_torch, exact, OP.tolerance, what)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_activation_accuracy_on_a_dense_sweep(path, activation, dtype):
    """Each unit interval by itself, so that large outputs do not excuse small ones."""
    for start in range(-30, 30):
        assert_activation_accurate(path, torch.linspace(start, start + 1, 1001), activation, dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_activation_accuracy_near_zero(path, activation, dtype):
    """Each binade down to the smallest subnormal number."""
    for exponent in range(-149, 0):
        values = torch.linspace(1, 2, 33) * 2.0**exponent
        assert_activation_accurate(path, torch.cat([values, -values]), activation, dtype)
    values = torch.tensor([0.0, -0.0, 1e-45, -1e-45])
    assert_activation_accurate(path, values, activation, dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("activation", cases.ACTIVATIONS)
def test_activation_far_out(path, activation):
    """Nothing is left on the left, and the argument on the right, however far."""
    far = torch.exp2(torch.arange(7.0, 128.0))
    left, right = activated(path, -far, activation), activated(path, far, activation)
    assert torch.equal(right, far)
    # A kernel's smallest exponential is no smaller than this; the argument must not multiply it to something.
    assert (left.abs() <= torch.finfo(torch.float32).tiny).all(), left
    values = torch.tensor([1e30, -1e30, 3e38, -3e38, 1e10, -1e10])
    assert activated(path, values, activation).tolist() == values.clamp_min(0).tolist()


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("activation", [*cases.ACTIVATIONS, "none"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_activation_of_non_finite_values(path, activation, dtype):
    values = torch.full((37,), 0.5)
    values[3::8], values[4::8], values[5::8] = float("nan"), float("inf"), float("-inf")
    got = activated(path, values, activation, dtype)
    exact = oracle.activate_float64(values.double(), activation)
    by_torch = oracle.activate_float32(values, activation).to(dtype)
    oracle.assert_accurate(got, by_torch, exact, OP.tolerance, (path, activation))
    assert got[3::8].isnan().all()
    # A result above the largest float16 is infinity, below the smallest minus infinity.
    big = torch.tensor([7e4, -7e4] * 10)
    below = float("-inf") if activation == "none" else 0
    assert activated(path, big, activation, torch.float16).tolist() == [float("inf"), below] * 10


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("activation", [*cases.ACTIVATIONS, "none"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_row_is_nan_and_the_others_untouched(path, activation, value):
    clean, weight, scale, bias, packed = operands(cases.Shape("rows", 11, 35, 37), torch.float32)
    for dtype in cases.DTYPES:
        x = clean.to(dtype, copy=True)
        x[4, 36], x[9, 0] = value, value
        spoilt = torch.zeros(11, dtype=torch.bool)
        spoilt[[4, 9]] = True
        for scheme in (cases.W8A8, cases.W8A7):
            got = run(path, x, weight, scale, bias, packed, scheme, activation)
            undisturbed = run(path, clean.to(dtype), weight, scale, bias, packed, scheme, activation)
            assert got[spoilt].isnan().all()
            assert oracle.same_bits(got[~spoilt], undisturbed[~spoilt])
            assert not undisturbed.isnan().any()
            integers = run(path, x, weight, scale, bias, packed, scheme, activation, torch.int32)
            assert not integers[spoilt].any()


def test_int32_ignores_what_it_says_it_ignores():
    x, weight, scale, bias, _ = operands(cases.Shape("acc", 3, 5, 8), torch.float32)
    plain = run("scalar", x, weight, scale, out_dtype=torch.int32)
    for path in cases.CPU_PATHS:
        got = run(path, x, weight, scale * float("nan"), bias, activation="gelu", out_dtype=torch.int32)
        assert oracle.same_bits(got, plain)
    assert np.array_equal(plain.numpy(), Exact(x, weight, scale, bias, cases.W8A8).acc.numpy())
