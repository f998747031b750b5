"""A result quantized for a following layer, and that layer: the bits of the ops they stand for."""

import cases
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int8_linear_requantize"]
SIZES = [(0, 5, 8), (1, 48, 64), (1, 1000, 600), (5, 17, 33), (33, 130, 90), (150, 97, 131), (300, 3000, 64), (3, 0, 8)]


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("out", [(8, True), (7, False), (4, True)])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_same_bits_as_two_calls(path, out, m, n, k):
    x, weight, scale, bias = cases.linear_operands(cases.Shape("requantize", m, n, k), torch.float32)
    packed = ops.int8_prepack(weight)
    with use_backend("cpu"), use_cpu_path(path):
        got = ops.int8_linear_requantize(x, None, scale, bias, packed, 7, False, "gelu", *out)
        y = ops.int8_linear(x, None, scale, bias, packed, 7, False, "gelu", torch.float32)
        expected = ops.quantize_per_token(y, *out)
    for a, b in zip(got, expected, strict=True):
        assert oracle.same_bits(a, b)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("scheme", [(8, True), (7, False)])
@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_the_following_layer(path, scheme, m, n, k):
    x, weight, scale, bias = cases.linear_operands(cases.Shape("following", m, n, k), torch.float32)
    packed, residual = ops.int8_prepack(weight), torch.ones(m, n)
    with use_backend("cpu"), use_cpu_path(path):
        q = ops.quantize_per_token(x, *scheme)
        got = ops.int8_linear_quantized(*q, None, scale, bias, packed, "silu", residual=residual)
        expected = ops.int8_linear(x, weight, scale, bias, None, *scheme, "silu", residual=residual)
        assert oracle.same_bits(got, expected)
        integers = ops.int8_linear_quantized(*q, weight, scale, out_dtype=torch.int32)
    reference = OPS["int8_linear_quantized"].reference(*q, weight, scale, None, None, "none", torch.int32, None)
    assert torch.equal(integers, reference)


def test_reference_of_two_layers():
    """A network of two layers, on the reference and on the kernels."""
    x, w1, s1, b1 = cases.linear_operands(cases.Shape("two", 9, 64, 40), torch.float32)
    _, w2, s2, b2 = cases.linear_operands(cases.Shape("two", 9, 30, 64), torch.float32)
    results = []
    for backend in ("cpu", "reference"):
        with use_backend(backend):
            hidden = ops.int8_linear_requantize(x, w1, s1, b1, activation="relu", out_bits=7, out_symmetric=False)
            results.append(ops.int8_linear_quantized(*hidden, w2, s2, b2))
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_a_bad_token_harms_no_other():
    x, weight, scale, _ = cases.linear_operands(cases.Shape("bad", 4, 20, 33), torch.float32)
    clean = ops.int8_linear_requantize(x, weight, scale)
    x[2, 5] = float("nan")
    q, s, _ = ops.int8_linear_requantize(x, weight, scale)
    assert s[2].isnan().all()
    assert torch.equal(q[[0, 1, 3]], clean[0][[0, 1, 3]])
    assert ops.int8_linear_quantized(q, s, clean[2], weight[:, :20], scale)[2].isnan().all()


X, WEIGHT, SCALE, _ = cases.linear_operands(cases.Shape("errors", 3, 5, 8), torch.float32)
Q, S, Z = ops.quantize_per_token(X)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.int8_linear_requantize(X, WEIGHT, SCALE, out_bits=9), ValueError, "requantize: out_bits: got 9"),
        (lambda: ops.int8_linear_requantize(X.int(), WEIGHT, SCALE), TypeError, "requantize: x: got torch.int32"),
        (lambda: ops.int8_linear_quantized(X, S, Z, WEIGHT, SCALE), TypeError, "quantized: q: got torch.float32"),
        (lambda: ops.int8_linear_quantized(Q, S[:2], Z, WEIGHT, SCALE), ValueError, "quantized: scale: got [2, 1]"),
        (lambda: ops.int8_linear_quantized(Q, S, Z.long(), WEIGHT, SCALE), TypeError, "quantized: zero_point: got"),
        (lambda: ops.int8_linear_quantized(Q[:, :4], S, Z, WEIGHT, SCALE), ValueError, "quantized: x, weight: got"),
        (lambda: ops.int8_linear_quantized(Q[0, 0], S, Z, WEIGHT, SCALE), ValueError, "quantized: q: got a 0-d"),
    ],
)
def test_errors(call, error, text):
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            call()
        assert str(raised.value).startswith(f"int8_linear_{text}")


def test_direct_calls_are_checked():
    op = torch.ops.tcompress
    for call in (
        lambda: op.int8_linear_quantized(X, S, Z, WEIGHT, SCALE, None, None, "none", torch.float32, None),
        lambda: op.int8_linear_quantized(Q, S[:1], Z, WEIGHT, SCALE, None, None, "none", torch.float32, None),
        lambda: op.int8_linear_requantize(X, WEIGHT, SCALE, None, None, 8, True, "none", 9, True),
        lambda: op.int8_linear(Q, WEIGHT, SCALE, None, None, 8, True, "none", torch.float32, None),
    ):
        with pytest.raises(RuntimeError):
            call()
