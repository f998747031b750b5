"""csrc/cuda/int8_linear.cuh and quantize_per_token.cuh on the CPU, thread by thread, against the references."""

from __future__ import annotations

import math
import sys

import pytest
import shim_library
import torch
from shim_library import ORDERS, Library, caught

import tcompress.ops  # noqa: F401

# the names in the package are the functions
per_token = sys.modules["tcompress.ops.quantize_per_token"]
int8_linear = sys.modules["tcompress.ops.int8_linear"]

pytestmark = pytest.mark.skipif(shim_library.compiler() is None, reason="g++ is not installed")


@pytest.fixture(scope="module")
def lib() -> Library:
    return shim_library.library()


@pytest.fixture(params=ORDERS)
def ordered(request: pytest.FixtureRequest, lib: Library) -> Library:
    lib.order = request.param
    return lib


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(*shape: int, seed: int = 0, low: int = -128) -> torch.Tensor:
    return torch.randint(low, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def equal(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.dtype == expected.dtype and torch.equal(got.nan_to_num(7e7), expected.nan_to_num(7e7))


def padded(x: torch.Tensor) -> torch.Tensor:
    """Rows of a multiple of 16 bytes, zeros at the end."""
    return torch.nn.functional.pad(x, (0, -x.shape[1] % 16)).contiguous()


# ---- quantizer


def rows(k: int, dtype: torch.dtype) -> torch.Tensor:
    x = random(7, k, seed=k) * 3
    if k:
        x[1] = 0
        x[2] = x[2].abs() + 1  # one sign
        x[3, k // 2] = 3e4  # an outlier
        x[4, k - 1] = math.nan
        x[5, 0] = -math.inf
        x[6] = torch.arange(k) / 2 - 3  # ties
    return x.to(dtype)


@pytest.mark.parametrize("dtype", per_token.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 8, 13, 1032])
def test_quantizer_is_the_reference_bit_for_bit(ordered, k, dtype):
    x = rows(k, dtype)
    for bits, symmetric in ((8, True), (5, True), (7, False), (8, False), (2, False)):
        got = ordered.quantize_per_token(x, bits, symmetric)
        for mine, reference in zip(got, per_token.reference(x, bits, symmetric), strict=True):
            assert equal(mine, reference)


def test_quantizer_without_columns(lib):
    x = torch.zeros(3, 0)
    for mine, reference in zip(lib.quantize_per_token(x), per_token.reference(x, 8, True), strict=True):
        assert equal(mine, reference)


def test_quantizer_takes_the_zero_point_off_and_pads(lib):
    x = rows(37, torch.float32)
    q, _, zero = per_token.reference(x, 7, False)
    got, _, _ = lib.quantize_per_token(x, 7, False, centred=True, ldq=48)
    assert torch.equal(got[:, :37].int(), q.int() - zero)
    assert (got[:, 37:] == 0).all()


# ---- linear


@pytest.mark.parametrize(
    ("tile", "m", "n", "k"),
    [
        ("wide", 131, 137, 200),
        ("wide", 128, 128, 64),
        ("middle", 65, 70, 333),
        ("middle", 1, 64, 63),
        ("narrow", 1, 33, 1000),
        ("narrow", 17, 32, 256),
        ("auto", 5, 3, 1),
        ("auto", 70, 40, 100),
    ],
)
def test_sums_are_exact(ordered, tile, m, n, k):
    a, weight = integers(m, k), integers(n, k, seed=1)
    zero = integers(m, seed=2).int()
    ones = torch.ones(m), torch.ones(n)
    expected = (a.int() - zero[:, None]).double() @ weight.double().t()
    got = ordered.int8_linear(padded(a), padded(weight), *ones, k, zero_point=zero, out_dtype=torch.int32, tile=tile)
    assert torch.equal(got.double(), expected)


def test_largest_sums(lib):
    k = 4096
    a, weight = torch.full((1, k), -128, dtype=torch.int8), torch.full((8, k), -128, dtype=torch.int8)
    got = lib.int8_linear(a, weight, torch.ones(1), torch.ones(8), k, out_dtype=torch.int32)
    assert (got == k * 128 * 128).all()


@pytest.mark.parametrize("dtype", per_token.FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("activation", int8_linear.ACTIVATIONS)
@pytest.mark.parametrize("n", [40, 37])
def test_linear_is_the_reference(lib, n, activation, dtype):
    """From floats to floats as the binding does it: quantizer, then product."""
    m, k = 20, 75
    x, weight = random(m, k, dtype=dtype) * 2, integers(n, k, seed=1)
    scale, bias, residual = random(n).abs() / 50, random(n, seed=2), random(m, n, seed=3, dtype=dtype)
    for bits, symmetric in ((8, True), (7, False)):
        q, token_scale, _ = lib.quantize_per_token(x, bits, symmetric, centred=True, ldq=80)
        got = lib.int8_linear(
            q, lib.pad_rows(weight), token_scale, scale, k, bias=bias, residual=residual,
            activation=activation, out_dtype=dtype,
        )  # fmt: skip
        expected = int8_linear.reference(x, weight, scale, bias, None, bits, symmetric, activation, None, residual)
        if activation in ("none", "relu"):
            assert torch.equal(got, expected)
        else:
            exact = int8_linear.reference(
                x, weight, scale, bias, None, bits, symmetric, activation, torch.float32, residual.float()
            )
            limit = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
            assert (got.float() - exact).abs().max() <= limit * exact.abs().max()


def test_token_that_is_not_finite_gives_nan(lib):
    x, weight = random(6, 40), integers(9, 40)
    x[2, 3], x[4, 0] = math.nan, math.inf
    q, scale, _ = lib.quantize_per_token(x, ldq=48)
    for activation in int8_linear.ACTIVATIONS:
        y = lib.int8_linear(q, padded(weight), scale, torch.rand(9), 40, activation=activation)
        assert y.isnan().all(1).tolist() == [False, False, True, False, True, False]
        assert not y[[0, 1, 3, 5]].isnan().any()


def test_no_k(lib):
    y = lib.int8_linear(padded(integers(3, 0)), padded(integers(4, 0)), torch.ones(3), torch.ones(4), 0)
    assert (y == 0).all()


# ---- what a test must be able to see


@pytest.mark.parametrize("bug", ["missing barrier", "unwaited copy", "off by one"])
@pytest.mark.parametrize("tile", ["wide", "middle", "narrow"])
def test_planted_bug_in_the_product_is_caught(lib, tile, bug):
    a, weight = integers(40, 512), integers(50, 512, seed=1)
    expected = (a.double() @ weight.double().t()).int()

    def run() -> bool:
        got = lib.int8_linear(a, weight, torch.ones(40), torch.ones(50), 512, out_dtype=torch.int32, tile=tile)
        return torch.equal(got, expected)

    assert not caught(lib, run)
    with lib.plant(bug):
        assert caught(lib, run)


@pytest.mark.parametrize("bug", ["missing barrier", "off by one"])
def test_planted_bug_in_the_quantizer_is_caught(lib, bug):
    x = random(2, 513)
    x[:, 512] = 10

    def run() -> bool:
        expected = per_token.reference(x, 8, True)
        return all(equal(a, b) for a, b in zip(lib.quantize_per_token(x), expected, strict=True))

    assert not caught(lib, run)
    with lib.plant(bug):
        assert caught(lib, run)
