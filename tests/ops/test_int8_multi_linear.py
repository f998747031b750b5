"""Several int8 layers over one input: the bits of one after the other; the gated form against its reference."""

import cases
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int8_multi_linear"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(k, sizes, name="multi"):
    """weights, scales, biases and kernel weights of layers with `sizes` outputs; the second has no bias."""
    g = cases.generator(name)
    weights = [cases.random_weight(n, k, (name, n, i)) for i, n in enumerate(sizes)]
    scales = [torch.rand(n, generator=g) * 0.01 + 1e-4 for n in sizes]
    biases = [None if i == 1 else torch.randn(n, generator=g) for i, n in enumerate(sizes)]
    return weights, scales, biases, [ops.int8_prepack(w) for w in weights]


def tokens(m, k, dtype=torch.float32):
    return cases.INPUTS["normal"](m, k, dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("scheme", [(8, True), (7, False)])
@pytest.mark.parametrize("m", [0, 1, 7, 33, 200])
@pytest.mark.parametrize("sizes", [(48,), (17, 100), (64, 32, 32), (0, 5, 49), (96, 1, 0, 50)])
def test_same_bits_as_one_after_the_other(path, scheme, m, sizes):
    weights, scales, biases, kernels = operands(67, sizes)
    x = tokens(m, 67)
    with use_backend("cpu"), use_cpu_path(path):
        parts = zip(weights, scales, biases, kernels, strict=True)
        together = ops.int8_multi_linear(x, weights, scales, biases, kernels, *scheme, activation="gelu")
        apart = [ops.int8_linear(x, *part, *scheme, activation="gelu") for part in parts]
        without = ops.int8_multi_linear(x, [None] * len(sizes), scales, biases, kernels, *scheme, activation="gelu")
    assert len(together) == len(sizes)
    for a, b, c in zip(together, apart, without, strict=True):
        assert oracle.same_bits(a, b)
        assert oracle.same_bits(a, c)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "n"), [(0, 5), (1, 48), (5, 17), (40, 130), (150, 97)])
def test_gated(path, dtype, m, n):
    parts = operands(90, (n, n), "gated")
    x = tokens(m, 90, dtype)
    with use_backend("cpu"), use_cpu_path(path):
        (got,) = ops.int8_multi_linear(x, *parts, activation="silu", gated=True)
    (expected,) = OP.reference(x, *parts, 8, True, "silu", True, None)
    assert got.dtype == expected.dtype == dtype
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=rounding, atol=rounding * 0.05)


def test_gated_against_float64():
    weights, scales, biases, kernels = operands(96, (130, 130), "gated")
    x = tokens(21, 96)
    (got,) = ops.int8_multi_linear(x, weights, scales, biases, kernels, activation="silu", gated=True)
    q, s, z = oracle.quantize(oracle.to_float32(x), 8, True)
    halves = []
    for w, scale, bias in zip(weights, scales, biases, strict=True):
        acc = torch.from_numpy(oracle.accumulate(q, z, w)).double()
        y = acc * torch.from_numpy(s).double()[:, None] * scale.double()
        halves.append(y if bias is None else y + bias.double())
    exact = oracle.activate_float64(halves[0], "silu") * halves[1]
    by_torch = oracle.activate_float32(halves[0].float(), "silu") * halves[1].float()
    oracle.assert_accurate(got, by_torch, exact, OP.tolerance)


def test_a_bad_token_harms_no_other():
    parts = operands(33, (20, 20))
    x = tokens(4, 33)
    for gated in (True, False):
        expected = ops.int8_multi_linear(x, *parts, gated=gated)
        bad = x.clone()
        bad[2, 5] = float("inf")
        for y, clean in zip(ops.int8_multi_linear(bad, *parts, gated=gated), expected, strict=True):
            assert y[2].isnan().all()
            assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a.update(weights=a["weights"][:1]), ValueError, "weights: got 1 for 2 scales, expected as many"),
        (lambda a: a.update(biases=[]), ValueError, "biases: got 0 for 2 scales, expected as many"),
        (lambda a: a.update(gated=True), ValueError, "gated: got weight_scales [[5], [6]], expected two of one shape"),
        (lambda a: a.update(out_dtype=torch.int32), TypeError, "out_dtype: got torch.int32, expected float32"),
        (lambda a: a.update(activation="tanh"), ValueError, "activation: got 'tanh', expected one of"),
        (lambda a: a.update(x=a["x"].int()), TypeError, "x: got torch.int32, expected"),
    ],
)
def test_errors(change, error, text):
    weights, scales, biases, kernels = operands(8, (5, 6))
    arguments = {
        "x": tokens(3, 8),
        "weights": weights,
        "weight_scales": scales,
        "biases": biases,
        "kernel_weights": kernels,
    }
    change(arguments)
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            ops.int8_multi_linear(**arguments)
        assert str(raised.value).startswith(f"int8_multi_linear: {text}")


def test_no_parts():
    with pytest.raises(ValueError, match="int8_multi_linear: weights: got 0 for 0 scales"):
        ops.int8_multi_linear(tokens(3, 8), [], [], [], [])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backward_raises(backend):
    parts = operands(8, (5, 6))
    x = tokens(3, 8).requires_grad_()
    with use_backend(backend):
        y = ops.int8_multi_linear(x, *parts)
    assert y[0].requires_grad
    with pytest.raises(RuntimeError, match="int8_multi_linear: backward: got a gradient"):
        y[0].sum().backward()


def test_direct_calls_are_checked():
    """What the dispatcher is given past the Python front end raises, and touches no memory."""
    weights, scales, biases, kernels = operands(8, (5, 6))
    op = torch.ops.tcompress.int8_multi_linear
    x = tokens(3, 8)
    for wrong in (
        (x, weights, scales, biases, kernels[:1], 8, True, "none", False, None),
        (x, weights, scales, biases, kernels, 8, True, "none", True, None),
        (x[:, :4], weights, scales, biases, kernels, 8, True, "none", False, None),
        (x, weights, scales, biases, kernels, 8, True, "none", False, torch.int32),
        (x, [None, None], scales, biases, [None, None], 8, True, "none", False, None),
    ):
        with pytest.raises(RuntimeError):
            op(*wrong)
