"""Several int4 layers over one input: the bits of one after the other; the gated form against its reference."""

import cases
import oracle
import pytest
import torch

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS
from tcompress.packing import pack_int4, unpack_int4

OP = OPS["int4_multi_linear"]
GROUP = 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def operands(k, sizes, name="multi", asymmetric=False):
    """weights, scales, zero points, biases and kernel weights; the second layer has no bias."""
    g = cases.generator(name)
    weights = [pack_int4(torch.randint(0, 16, (n, k), dtype=torch.uint8, generator=g)) for n in sizes]
    scales = [(torch.rand(n, -(-k // GROUP), generator=g) * 0.1 + 1e-2).half() for n in sizes]
    zeros = [torch.randint(0, 16, s.shape, dtype=torch.uint8, generator=g) if asymmetric else None for s in scales]
    biases = [None if i == 1 else torch.randn(n, generator=g) for i, n in enumerate(sizes)]
    packed = [ops.int4_prepack(w, s, z, k, GROUP) for w, s, z in zip(weights, scales, zeros, strict=True)]
    return weights, scales, zeros, biases, packed


def tokens(m, k, dtype=torch.float32):
    return cases.INPUTS["normal"](m, k, dtype)


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("scheme", [(8, True), (7, False), (None, True)])
@pytest.mark.parametrize("m", [0, 1, 7, 33, 200])
@pytest.mark.parametrize("sizes", [(48,), (17, 100), (64, 32, 32), (0, 5, 49), (96, 1, 0, 50)])
def test_same_bits_as_one_after_the_other(path, scheme, m, sizes):
    weights, scales, zeros, biases, kernels = operands(67, sizes, asymmetric=sizes[0] == 17)
    x = tokens(m, 67)
    with use_backend("cpu"), use_cpu_path(path):
        parts = zip(weights, scales, zeros, biases, kernels, strict=True)
        together = ops.int4_multi_linear(x, weights, scales, zeros, biases, kernels, GROUP, *scheme, activation="gelu")
        apart = [ops.int4_linear(x, *part, GROUP, *scheme, activation="gelu") for part in parts]
        nothing = [None] * len(sizes)
        without = ops.int4_multi_linear(x, nothing, scales, zeros, biases, kernels, GROUP, *scheme, activation="gelu")
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
        (got,) = ops.int4_multi_linear(x, *parts, GROUP, activation="silu", gated=True)
    (expected,) = OP.reference(x, *parts, GROUP, 8, True, "silu", True, None)
    assert got.dtype == expected.dtype == dtype
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}[dtype]
    torch.testing.assert_close(got.double(), expected.double(), rtol=rounding, atol=rounding * 0.05)


def test_gated_against_float64():
    weights, scales, zeros, biases, kernels = operands(96, (130, 130), "gated")
    x = tokens(21, 96)
    (got,) = ops.int4_multi_linear(x, weights, scales, zeros, biases, kernels, GROUP, activation="silu", gated=True)
    q, s, _ = oracle.quantize(oracle.to_float32(x), 8, True)
    halves = []
    for w, scale, bias in zip(weights, scales, biases, strict=True):
        dense = (unpack_int4(w, 96).double() - 8) * scale.double().repeat_interleave(GROUP, 1)
        y = torch.from_numpy(q).double() @ dense.t() * torch.from_numpy(s).double()[:, None]
        halves.append(y if bias is None else y + bias.double())
    exact = oracle.activate_float64(halves[0], "silu") * halves[1]
    by_torch = oracle.activate_float32(halves[0].float(), "silu") * halves[1].float()
    oracle.assert_accurate(got, by_torch, exact, OP.tolerance)


def test_zero_points_of_some():
    weights, scales, zeros, biases, kernels = operands(8, (5, 6), asymmetric=True)
    with pytest.raises(ValueError, match="int4_multi_linear: zero_points: got some, expected all or none"):
        ops.int4_multi_linear(tokens(3, 8), weights, scales, [zeros[0], None], biases, kernels, GROUP)


def test_a_bad_token_harms_no_other():
    parts = operands(33, (20, 20))
    x = tokens(4, 33)
    for gated in (True, False):
        expected = ops.int4_multi_linear(x, *parts, GROUP, gated=gated)
        bad = x.clone()
        bad[2, 5] = float("inf")
        for y, clean in zip(ops.int4_multi_linear(bad, *parts, GROUP, gated=gated), expected, strict=True):
            assert y[2].isnan().all()
            assert torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a.update(weights=a["weights"][:1]), ValueError, "weights: got 1 for 2 scales, expected as many"),
        (lambda a: a.update(biases=[]), ValueError, "biases: got 0 for 2 scales, expected as many"),
        (
            lambda a: a.update(gated=True),
            ValueError,
            "gated: got weight_scales [[5, 1], [6, 1]], expected two",
        ),
        (lambda a: a.update(out_dtype=torch.int32), TypeError, "out_dtype: got torch.int32, expected float32"),
        (lambda a: a.update(activation="tanh"), ValueError, "activation: got 'tanh', expected one of"),
        (lambda a: a.update(x=a["x"].int()), TypeError, "x: got torch.int32, expected"),
    ],
)
def test_errors(change, error, text):
    weights, scales, zeros, biases, kernels = operands(8, (5, 6))
    arguments = {
        "x": tokens(3, 8),
        "weights": weights,
        "weight_scales": scales,
        "zero_points": zeros,
        "group_size": GROUP,
        "biases": biases,
        "kernel_weights": kernels,
    }
    change(arguments)
    for backend in ("cpu", "reference"):
        with use_backend(backend), pytest.raises(error) as raised:
            ops.int4_multi_linear(**arguments)
        assert str(raised.value).startswith(f"int4_multi_linear: {text}")


def test_no_parts():
    with pytest.raises(ValueError, match="int4_multi_linear: weights: got 0 for 0 scales"):
        ops.int4_multi_linear(tokens(3, 8), [], [], [], [], [])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_backward_raises(backend):
    parts = operands(8, (5, 6))
    x = tokens(3, 8).requires_grad_()
    with use_backend(backend):
        y = ops.int4_multi_linear(x, *parts, GROUP)
    assert y[0].requires_grad
    with pytest.raises(RuntimeError, match="int4_multi_linear: backward: got a gradient"):
        y[0].sum().backward()


def test_direct_calls_are_checked():
    """What the dispatcher is given past the Python front end raises, and touches no memory."""
    weights, scales, zeros, biases, kernels = operands(8, (5, 6))
    op = torch.ops.tcompress.int4_multi_linear
    x = tokens(3, 8)
    for wrong in (
        (x, weights, scales, zeros, biases, kernels[:1], GROUP, 8, True, "none", False, None),
        (x, weights, scales, zeros, biases, kernels, GROUP, 8, True, "none", True, None),
        (x[:, :4], weights, scales, zeros, biases, kernels, GROUP, 8, True, "none", False, None),
        (x, weights, scales, zeros, biases, kernels, GROUP, 8, True, "none", False, torch.int32),
        (x, [None, None], scales, zeros, biases, [None, None], GROUP, 8, True, "none", False, None),
    ):
        with pytest.raises(RuntimeError):
            op(*wrong)
