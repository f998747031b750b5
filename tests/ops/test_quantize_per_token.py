from functools import cache

import cases
import numpy as np
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["quantize_per_token"]
ROWS = sorted({(shape.m, shape.k) for shape in cases.SHAPES})


def run(path, x, bits, symmetric):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.quantize_per_token(x, bits, symmetric)


@cache
def ordinary(m, k, dtype, bits, symmetric):
    x = cases.INPUTS["normal"](m, k, dtype)
    return x, OP.reference(x, bits, symmetric)


def assert_same(got, expected, what):
    for name, a, b in zip(("q", "scale", "zero_point"), got, expected, strict=True):
        assert oracle.same_bits(a, b), f"{what}: {name}: got {a}, expected {b}"


def assert_matches_oracle(x, result, bits, symmetric):
    q, scale, zero_point = (t.numpy() for t in result)
    rows = oracle.to_float32(x)
    expected = oracle.quantize(rows, bits, symmetric)
    np.testing.assert_array_equal(q.reshape(rows.shape), expected[0])
    np.testing.assert_array_equal(scale.reshape(-1), expected[1])  # NaN equals NaN
    np.testing.assert_array_equal(zero_point.reshape(-1), expected[2])
    oracle.assert_quantized(rows, expected, bits, symmetric)


# ---- the reference against real numbers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", cases.INPUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_reference_matches_float64_on_hostile_inputs(name, dtype):
    for m, k in ((1, 1), (5, 37), (4, 128)):
        x = cases.INPUTS[name](m, k, dtype)
        for bits, symmetric in cases.SCHEMES:
            assert_matches_oracle(x, OP.reference(x, bits, symmetric), bits, symmetric)


@pytest.mark.parametrize(("m", "k"), ROWS)
def test_reference_matches_float64_on_every_shape(m, k):
    for bits, symmetric in (cases.W8A8, cases.W8A7):
        x, result = ordinary(m, k, torch.float32, bits, symmetric)
        assert_matches_oracle(x, result, bits, symmetric)


def test_by_hand_symmetric():
    # 2 bits: -1, 0, 1 with scale 1; ties go to the even neighbour
    q, scale, zero_point = ops.quantize_per_token(torch.tensor([[1.0, 0.5, -0.5, 0.75, -1.0, 0.0]]), 2, True)
    assert q.tolist() == [[1, 0, 0, 1, -1, 0]]
    assert (scale.tolist(), zero_point.tolist()) == ([[1.0]], [[0]])
    # 8 bits, scale 1
    q, scale, zero_point = ops.quantize_per_token(torch.tensor([[127.0, 0.5, 1.5, 2.5, -2.5, -126.5, 3.4]]))
    assert q.tolist() == [[127, 0, 2, 2, -2, -126, 3]]
    assert (scale.tolist(), zero_point.tolist()) == ([[1.0]], [[0]])


def test_by_hand_asymmetric():
    # 2 bits: 0 to 3 over [-1, 2], so scale 1 and zero point 1
    q, scale, zero_point = ops.quantize_per_token(torch.tensor([[-1.0, 2.0, 0.5, 1.5, -0.5, 0.0]]), 2, False)
    assert q.tolist() == [[0, 3, 1, 3, 1, 1]]
    assert (scale.tolist(), zero_point.tolist()) == ([[1.0]], [[1]])
    # all positive: the range starts at 0; all negative: it ends there
    q, scale, zero_point = ops.quantize_per_token(torch.tensor([[3.0, 6.0], [-3.0, -6.0]]), 2, False)
    assert q.tolist() == [[2, 3], [1, 0]]
    assert (scale.tolist(), zero_point.tolist()) == ([[2.0], [2.0]], [[0], [3]])


def test_zero_row_gives_zeros_and_a_normal_scale():
    for path in cases.CPU_PATHS:
        for bits, symmetric in cases.SCHEMES:
            q, scale, zero_point = run(path, torch.zeros(2, 21), bits, symmetric)
            assert not q.any()
            assert not zero_point.any()
            assert (scale >= torch.finfo(torch.float32).tiny).all()


# ---- every path against the reference, bit for bit ------------------------------------------------------------------


def test_the_scalar_path_is_tested():
    assert "scalar" in cases.CPU_PATHS


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize(("m", "k"), ROWS)
def test_bit_exact_on_every_shape(path, m, k):
    for dtype in cases.DTYPES:
        for bits, symmetric in cases.SCHEMES:
            x, expected = ordinary(m, k, dtype, bits, symmetric)
            assert_same(run(path, x, bits, symmetric), expected, (path, dtype, bits, symmetric))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_bit_exact_on_hostile_inputs(path, name):
    for m, k in ((1, 1), (5, 37), (3, 64), (3, 71)):
        for dtype in cases.DTYPES:
            x = cases.INPUTS[name](m, k, dtype)
            for bits, symmetric in cases.SCHEMES:
                expected = OP.reference(x, bits, symmetric)
                assert_same(run(path, x, bits, symmetric), expected, (path, name, m, k, dtype, bits, symmetric))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_bit_exact_on_every_layout(path, layout):
    for dtype in cases.DTYPES:
        x = cases.LAYOUTS[layout](cases.INPUTS["normal"](6, 21, dtype))
        for bits, symmetric in (cases.W8A8, cases.W8A7):
            got = run(path, x, bits, symmetric)
            dense = x.resolve_neg().contiguous().clone()
            assert_same(got, OP.reference(dense, bits, symmetric), (path, layout, dtype))
            assert_matches_oracle(x, got, bits, symmetric)
            assert got[0].shape == x.shape
            assert got[1].shape == got[2].shape == (*x.shape[:-1], 1)
            assert got[0].dtype == (torch.int8 if symmetric else torch.uint8)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_number(path, dtype):
    """Each finite one, at the front of a row of its own, and next to others in long rows."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)
    finite = every[torch.isfinite(every)]
    rows = torch.zeros(len(finite), 3, dtype=dtype)
    rows[:, 0] = finite
    shuffled = finite[torch.randperm(len(finite), generator=cases.generator("order"))]
    for x in (rows, finite.view(-1, 16), shuffled.view(-1, 32)):
        for bits, symmetric in ((2, True), cases.W8A8, cases.W8A7):
            assert_same(run(path, x, bits, symmetric), OP.reference(x, bits, symmetric), (path, dtype, bits, symmetric))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_element_spoils_its_row_only(path, value):
    """At every place of a row: in each lane, and in the tail."""
    k = 37
    clean = cases.INPUTS["normal"](k + 2, k, torch.float32)
    x = clean.clone()
    for i in range(k):
        x[i + 1, i] = value
    for bits, symmetric in (cases.W8A8, cases.W8A7):
        q, scale, zero_point = run(path, x, bits, symmetric)
        assert scale[1:-1].isnan().all()
        assert not q[1:-1].any()
        assert not zero_point[1:-1].any()
        for row in (0, -1):
            expected = OP.reference(clean[row], bits, symmetric)
            assert_same((q[row], scale[row], zero_point[row]), expected, (path, row))


# ---- errors and accounting ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "bits", "error", "text"),
    [
        ([1.0], 8, TypeError, "quantize_per_token: x: got list"),
        (torch.zeros(2, 2, dtype=torch.float64), 8, TypeError, "quantize_per_token: x: got torch.float64"),
        (torch.zeros(2, 2, dtype=torch.int32), 8, TypeError, "quantize_per_token: x: got torch.int32"),
        (torch.tensor(1.0), 8, ValueError, "quantize_per_token: x: got a 0-d tensor"),
        (torch.zeros(2), 1, ValueError, "quantize_per_token: bits: got 1"),
        (torch.zeros(2), 9, ValueError, "quantize_per_token: bits: got 9"),
        (torch.zeros(2), -8, ValueError, "quantize_per_token: bits: got -8"),
    ],
)
def test_errors(x, bits, error, text):
    with pytest.raises(error) as raised:
        ops.quantize_per_token(x, bits)
    assert str(raised.value).startswith(text)
    assert ", expected " in str(raised.value)


@pytest.mark.parametrize(
    ("x", "bits"),
    [
        (torch.zeros(2, 2, dtype=torch.float64), 8),
        (torch.zeros(2, 2, dtype=torch.int8), 8),
        (torch.tensor(1.0), 8),
        (torch.zeros(2), 1),
        (torch.zeros(2), 9),
        (torch.zeros(2), 2**40),
    ],
)
def test_dispatcher_guards_memory_by_itself(x, bits):
    with pytest.raises(RuntimeError):
        torch.ops.tcompress.quantize_per_token(x, bits, True)


def test_flops_and_bytes():
    x = torch.zeros(3, 4, dtype=torch.bfloat16)
    assert OP.flops(x, 8, True) == 5 * 12
    assert OP.nbytes(x, 8, True) == 12 * 2 + 12 * 1 + 3 * (4 + 4)
    assert OP.nbytes(torch.zeros(3, 0), 8, True) == 0
