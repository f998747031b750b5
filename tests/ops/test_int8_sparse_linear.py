"""The numbers of `int8_sparse_linear` are those of `int8_linear` on the dense integers, bit for bit, on every path."""

from functools import cache

import cases
import oracle
import pytest
import sparse_cases
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP, DENSE = OPS["int8_sparse_linear"], OPS["int8_linear"]
LAYOUTS = sparse_cases.LAYOUTS[torch.int8]
SCHEMES = (cases.W8A8, cases.W8A7)
# Up to 8 tokens take the way for few, 4 at a time; vectors have 4, 8 or 16 tokens, tiles 32 or 64.
TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 128, 130)
SIZES = ((1, 1, "full"), (9, 63, "half"), (49, 257, "5 %"), (97, 130, "8x4 blocks"), (7, 2300, "half"))


def run(path, x, weight, scale, bias=None, layout="1x4", scheme=cases.W8A8, activation="none", dtype=None, res=None):
    """Of a dense weight, or of one that is packed already."""
    packed = weight if weight.dim() == 1 else ops.sparse_prepack(weight, layout)
    with use_backend("cpu"), use_cpu_path(path):
        return ops.int8_sparse_linear(x, packed, scale, bias, layout, *scheme, activation, dtype, res)


def dense(x, weight, scale, bias=None, scheme=cases.W8A8, activation="none", dtype=None, res=None):
    """The reference of `int8_linear`, which test_int8_linear.py holds against int64 and float64."""
    return DENSE.reference(x, weight, scale, bias, None, *scheme, activation, dtype, res)


def dense_kernel(path, x, weight, scale, bias, scheme, activation, dtype=None, res=None):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.int8_linear(x, weight, scale, bias, None, *scheme, activation, dtype, res)


@cache
def operands(m, n, k, pattern, dtype=torch.float32):
    """x, weight, weight_scale, bias, and the weight in each layout."""
    x, _, scale, bias = cases.linear_operands(cases.Shape(pattern, m, n, k), dtype)
    weight = sparse_cases.weight(n, k, torch.int8, pattern)
    return x, weight, scale, bias, {layout: ops.sparse_prepack(weight, layout) for layout in LAYOUTS}


@cache
def expected(m, n, k, pattern, scheme, out_dtype, dtype=torch.float32):
    x, weight, scale, bias, _ = operands(m, n, k, pattern, dtype)
    return dense(x, weight, scale, bias, scheme, "none", out_dtype)


def assert_bit_exact(path, layout, m, n, k, pattern, schemes=SCHEMES, dtype=torch.float32):
    x, _, scale, bias, packed = operands(m, n, k, pattern, dtype)
    for scheme in schemes:
        for out_dtype in (torch.int32, None):
            got = run(path, x, packed[layout], scale, bias, layout, scheme, "none", out_dtype)
            what = (m, n, k, pattern, scheme, dtype, out_dtype)
            assert oracle.same_bits(got, expected(m, n, k, pattern, scheme, out_dtype, dtype)), what


@pytest.fixture(autouse=True)
def torch_threads():
    """One but where a test asks for more: what follows is small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", sparse_cases.PATTERNS)
def test_reference(layout, pattern):
    for n, k in sparse_cases.SIZES:
        x, weight, scale, bias, packed = operands(3, n, k, pattern)
        for scheme in SCHEMES:
            got = OP.reference(x, packed[layout], scale, bias, layout, *scheme, "silu", None)
            assert oracle.same_bits(got, dense(x, weight, scale, bias, scheme, "silu"))
            q, _, zero_point = oracle.quantize(oracle.to_float32(x), *scheme)
            sums = torch.from_numpy(oracle.accumulate(q, zero_point, weight)).int()
            got = OP.reference(x, packed[layout], scale, bias, layout, *scheme, "silu", torch.int32)
            assert oracle.same_bits(got, sums)


def test_by_hand():
    # 2 bits: a = [1, 0, -1] with scale 2; acc = [1 - 3, 0, -128 - 127]
    x, bias = torch.tensor([[2.0, 0.5, -2.0]]), torch.tensor([3.0, 1.0, 100.0])
    weight = torch.tensor([[1, 0, 3], [0, 7, 0], [-128, 0, 127]], dtype=torch.int8)
    scale = torch.tensor([0.5, 1.0, 0.25])
    for path in cases.CPU_PATHS:
        for layout in LAYOUTS:
            got = run(path, x, weight, scale, bias, layout, (2, True), dtype=torch.int32)
            assert got.tolist() == [[-2, 0, -255]]
            assert run(path, x, weight, scale, bias, layout, (2, True)).tolist() == [[1.0, 1.0, -27.5]]


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", TOKENS)
def test_every_number_of_tokens(path, layout, m):
    for size in SIZES:
        assert_bit_exact(path, layout, m, *size)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pattern", sparse_cases.PATTERNS)
def test_every_pattern(path, layout, pattern):
    for n, k in sparse_cases.SIZES:
        for m in (1, 6, 35):
            assert_bit_exact(path, layout, m, n, k, pattern)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_every_scheme_and_type(path, layout, dtype):
    for m in (3, 19):
        assert_bit_exact(path, layout, m, 50, 270, "half", cases.LINEAR_SCHEMES, dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_hostile_inputs(path, name):
    for m, n, k in ((1, 1, 1), (7, 35, 37), (33, 9, 300)):
        scale = torch.rand(n, generator=cases.generator(name)) + 0.01
        weights = {weight_name: make(n, k) for weight_name, make in cases.WEIGHTS.items()}
        half = weights["random"].masked_fill(~sparse_cases.PATTERNS["half"](n, k), 0)
        for weight_name, weight in (*weights.items(), ("half", half)):
            packed = {layout: ops.sparse_prepack(weight, layout) for layout in LAYOUTS}
            dtypes = cases.DTYPES if weight_name == "half" else (torch.float32,)
            for dtype in dtypes:
                x = cases.INPUTS[name](m, k, dtype)
                for scheme in SCHEMES:
                    for out_dtype in (torch.int32, None):
                        wanted = dense(x, weight, scale, scheme=scheme, dtype=out_dtype)
                        for layout in LAYOUTS:
                            got = run(path, x, packed[layout], scale, None, layout, scheme, dtype=out_dtype)
                            assert oracle.same_bits(got, wanted), (m, weight_name, dtype, scheme, layout, out_dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("weight", cases.WEIGHTS)
def test_longest_sum_at_its_bounds(path, weight):
    k = 65536
    w, scale = cases.WEIGHTS[weight](2, k), torch.ones(2)
    signs = (-1.0) ** torch.arange(k)
    x = torch.stack([torch.ones(k), -torch.ones(k), signs, -signs])
    packed = {layout: ops.sparse_prepack(w, layout) for layout in LAYOUTS}
    for rows in (x, x.repeat(3, 1)):
        for scheme in SCHEMES:
            wanted = dense(rows, w, scale, scheme=scheme, dtype=torch.int32)
            for layout in LAYOUTS:
                got = run(path, rows, packed[layout], scale, None, layout, scheme, dtype=torch.int32)
                assert oracle.same_bits(got, wanted), (weight, scheme, layout)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", cases.LAYOUTS)
def test_every_layout_of_x(path, name):
    for m in (6, 34):
        _, weight, scale, bias, packed = operands(m, 19, 70, "half")
        for dtype in cases.DTYPES:
            x = cases.LAYOUTS[name](cases.INPUTS["normal"](m, 70, dtype))
            for layout, scheme in zip(LAYOUTS, SCHEMES, strict=True):
                got = run(path, x, packed[layout], scale, bias, layout, scheme)
                assert got.shape == (*x.shape[:-1], 19)
                assert got.is_contiguous()
                plain = x.resolve_neg().contiguous().clone()
                assert oracle.same_bits(got, dense(plain, weight, scale, bias, scheme)), (m, dtype, layout)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("m", [5, 40])
def test_optional_arguments(path, layout, m):
    """Biases of each type, strided ones too; residuals of all strides; every activation, as the dense kernel has it."""
    x, weight, scale, bias, packed = operands(m, 50, 130, "half")
    strided = torch.stack([bias, torch.full_like(bias, float("nan"))], 1)[:, 0]
    for b in (None, bias, strided, bias.half(), bias.bfloat16(), bias.double()):
        for out_dtype in (*cases.DTYPES, torch.int32, None):
            got = run(path, x, packed[layout], scale, b, layout, dtype=out_dtype)
            assert oracle.same_bits(got, dense(x, weight, scale, b, dtype=out_dtype)), out_dtype
    strided_scale = torch.stack([scale, torch.full_like(scale, float("nan"))], 1)[:, 0]
    assert oracle.same_bits(run(path, x, packed[layout], strided_scale, bias, layout), dense(x, weight, scale, bias))
    for activation in (*cases.ACTIVATIONS, "none"):
        for scheme, dtype in zip((*SCHEMES, cases.W8A8), cases.DTYPES, strict=True):
            residual = cases.INPUTS["normal"](m, 50, dtype)
            wanted = dense_kernel(path, x, weight, scale, bias, scheme, activation, dtype, residual)
            for view in cases.residual_views(residual):
                got = run(path, x, packed[layout], scale, bias, layout, scheme, activation, dtype, view)
                assert oracle.same_bits(got, wanted), (activation, dtype)
            wanted = dense_kernel(path, x, weight, scale, bias, scheme, activation, dtype)
            got = run(path, x, packed[layout], scale, bias, layout, scheme, activation, dtype)
            assert oracle.same_bits(got, wanted), (activation, dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_row_is_nan_and_the_others_untouched(path, layout, value):
    for m in (7, 41):
        clean, _, scale, bias, packed = operands(m, 35, 130, "empty rows")
        x = clean.clone()
        x[4, 129] = x[m - 1, 0] = value
        spoilt = torch.zeros(m, dtype=torch.bool)
        spoilt[[4, m - 1]] = True
        for scheme in SCHEMES:
            got = run(path, x, packed[layout], scale, bias, layout, scheme, "gelu")
            undisturbed = run(path, clean, packed[layout], scale, bias, layout, scheme, "gelu")
            assert got[spoilt].isnan().all()
            assert oracle.same_bits(got[~spoilt], undisturbed[~spoilt])
            assert not undisturbed.isnan().any()
            assert not run(path, x, packed[layout], scale, bias, layout, scheme, dtype=torch.int32)[spoilt].any()


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("pattern", ["half", "last output"])
def test_result_does_not_depend_on_the_number_of_threads(path, pattern, torch_threads):
    for m, n, k in ((301, 60, 300), (1, 2500, 300), (40, 700, 300)):
        for layout in LAYOUTS:
            for threads in (1, 2, 3):
                torch_threads(threads)
                assert_bit_exact(path, layout, m, n, k, pattern)
