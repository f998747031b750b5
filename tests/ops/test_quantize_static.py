"""`quantize_static`: its reference against numpy, every path against the reference, bit for bit."""

from __future__ import annotations

import cases
import numpy as np
import oracle
import pytest
import torch

from tcompress import explain, ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["quantize_static"]
ROWS = sorted({(shape.m, shape.k) for shape in cases.SHAPES if shape.k <= 2049})
SCALES = (0.0213, 3.7e-5, 2.0**-100, 1e30)


def zero_of(bits, symmetric):
    return None if symmetric else torch.tensor(2**bits // 3, dtype=torch.int32)


def run(path, x, scale, bits, symmetric):
    with use_backend("cpu"), use_cpu_path(path):
        return ops.quantize_static(x, torch.tensor(scale), zero_of(bits, symmetric), bits, symmetric)


def reference(x, scale, bits, symmetric):
    return OP.reference(x, torch.tensor(scale), zero_of(bits, symmetric), bits, symmetric)


def assert_same(got, expected, what):
    for name, a, b in zip(("q", "scale", "zero_point"), got, expected, strict=True):
        assert oracle.same_bits(a, b), f"{what}: {name}: got {a}, expected {b}"


@pytest.mark.parametrize("name", cases.INPUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_reference_matches_numpy(name, dtype):
    """float64 but for the two steps that the definition has in float32: the reciprocal and the product."""
    for m, k in ((1, 1), (5, 37), (4, 128)):
        x = cases.INPUTS[name](m, k, dtype)
        rows = oracle.to_float32(x)
        finite = np.isfinite(rows).all(1)
        for bits, symmetric in cases.SCHEMES:
            for value in SCALES:
                q, scale, zero = (t.numpy() for t in reference(x, value, bits, symmetric))
                point = 0 if symmetric else 2**bits // 3
                low, high = (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
                with np.errstate(over="ignore"):
                    scaled = (rows[finite] * (np.float32(1) / np.float32(value))).astype(np.float64)
                np.testing.assert_array_equal(q[finite], np.clip(np.rint(scaled) + point, low, high))
                np.testing.assert_array_equal(scale[finite, 0], np.float32(value))
                np.testing.assert_array_equal(zero[finite, 0], point)
                assert np.isnan(scale[~finite]).all()
                assert not q[~finite].any()
                assert not zero[~finite].any()


def test_by_hand():
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 1e30, -1e30, -128.0]])
    q, scale, zero_point = ops.quantize_static(x, torch.tensor(1.0))
    assert q.tolist() == [[127, 0, 2, -2, 127, -127, -127]]
    assert (q.dtype, scale.tolist(), zero_point.tolist()) == (torch.int8, [[1.0]], [[0]])
    three = torch.tensor([3], dtype=torch.int32)
    q, scale, zero_point = ops.quantize_static(x / 2, torch.tensor([0.5]), three, 7, False)
    assert q.tolist() == [[127, 3, 5, 1, 127, 0, 0]]
    assert (q.dtype, scale.tolist(), zero_point.tolist()) == (torch.uint8, [[0.5]], [[3]])


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize(("m", "k"), ROWS)
def test_bit_exact_on_every_shape(path, m, k):
    for dtype in cases.DTYPES:
        x = cases.INPUTS["normal"](m, k, dtype)
        for bits, symmetric in ((8, True), (7, False), (2, True)):
            expected = reference(x, 0.0213, bits, symmetric)
            assert_same(run(path, x, 0.0213, bits, symmetric), expected, (path, dtype, bits, symmetric))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("name", cases.INPUTS)
def test_bit_exact_on_hostile_inputs(path, name):
    for m, k in ((1, 1), (5, 37), (3, 71)):
        for dtype in cases.DTYPES:
            x = cases.INPUTS[name](m, k, dtype)
            for bits, symmetric in cases.SCHEMES:
                for scale in SCALES:
                    expected = reference(x, scale, bits, symmetric)
                    assert_same(run(path, x, scale, bits, symmetric), expected, (path, name, dtype, bits, scale))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_strides_do_not_matter(path, layout):
    x = cases.LAYOUTS[layout](cases.INPUTS["normal"](6, 20, torch.float32))
    assert_same(run(path, x, 0.02, 8, True), reference(x.contiguous(), 0.02, 8, True), (path, layout))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), 1e-40])
def test_a_scale_that_is_none_gives_nan(path, scale):
    x = torch.ones(2, 5)
    got = run(path, x, scale, 8, True)
    assert got[1].isnan().all()
    assert not got[0].any()
    assert_same(got, reference(x, scale, 8, True), (path, scale))


def test_a_scale_per_token_is_the_same_where_there_is_one_token():
    x = torch.randn(1, 50, generator=torch.Generator().manual_seed(0))
    for bits, symmetric in cases.SCHEMES:
        q, scale, zero_point = ops.quantize_per_token(x, bits, symmetric)
        fixed = ops.quantize_static(x, scale[0, 0], None if symmetric else zero_point[0, 0], bits, symmetric)
        assert_same(fixed, (q, scale, zero_point), (bits, symmetric))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"x": torch.ones(2, dtype=torch.int8)}, TypeError, "x: got torch.int8"),
        ({"x": torch.tensor(1.0)}, ValueError, "x: got a 0-d tensor"),
        ({"bits": 9}, ValueError, "bits: got 9"),
        ({"scale": torch.tensor(1)}, TypeError, "scale: got torch.int64, expected float32"),
        ({"scale": torch.ones(2)}, ValueError, r"scale: got \[2\], expected one number"),
        ({"symmetric": False}, TypeError, "zero_point: got None, expected None with symmetric integers, int32 with"),
        ({"zero_point": torch.tensor(1, dtype=torch.int32)}, TypeError, "zero_point: got a tensor"),
        ({"symmetric": False, "zero_point": torch.tensor(1)}, TypeError, "zero_point: got torch.int64, expected int32"),
        ({"scale": torch.ones((), device="meta")}, ValueError, "scale: got a tensor on meta, expected one on cpu"),
    ],
)
def test_wrong_arguments(changes, error, text):
    arguments = {"x": torch.ones(2, 3), "scale": torch.tensor(1.0)} | changes
    with pytest.raises(error, match=f"quantize_static: {text}"):
        ops.quantize_static(**arguments)


def test_explain():
    assert explain("quantize_static", torch.ones(2, 3), torch.tensor(1.0)).backend == "cpu"
