"""`int4_sparse_linear` against the dense op's numbers, exact integers and float64, on every path."""

import cases
import int4_sparse_cases as cases4
import pytest
import torch
from oracle import quantize, to_float32

from tcompress import ops, use_backend, use_cpu_path
from tcompress.ops._registry import OPS

OP = OPS["int4_sparse_linear"]
TOKENS = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 65, 130)
ACTIVATIONS = ((8, True), (7, False), (4, True))


def on_every_path(*arguments, **options):
    for path in cases.CPU_PATHS:
        with use_backend("cpu"), use_cpu_path(path):
            yield path, ops.int4_sparse_linear(*arguments, **options)


@pytest.mark.parametrize("kept", cases4.KEPT)
@pytest.mark.parametrize(("bits", "symmetric"), ACTIVATIONS)
def test_exact_sums(kept, bits, symmetric):
    """With scales of one and activations that are integers already, the result is the sum of integers, exactly."""
    for n, k in cases4.SIZES:
        w = cases4.weight(n, k, kept)
        for m, group_size in zip(TOKENS, cases4.GROUPS * 4, strict=False):
            scale = torch.ones(n, -(-k // group_size), dtype=torch.float16)
            packed = ops.int4_sparse_prepack(w, scale, group_size)
            limit = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
            x = torch.randint(-limit if symmetric else 0, limit + 1, (m, k), generator=cases.generator((m, n, k)))
            if k:
                x[:, 0] = limit  # then a token's scale is 1
            expected = x @ w.long().t()
            got = on_every_path(x.float(), packed, n, None, group_size, act_bits=bits, act_symmetric=symmetric)
            for path, y in got:
                assert torch.equal(y.long(), expected), (path, n, k, m, group_size)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "symmetric"), ACTIVATIONS)
def test_the_numbers_of_the_dense_op(dtype, bits, symmetric):
    n, k, m = 50, 1030, 37
    w = cases4.weight(n, k)
    x, bias = torch.randn(m, k, generator=cases.generator(0)), torch.randn(n, generator=cases.generator(1))
    for group_size in cases4.GROUPS:
        scale = cases4.scales(n, k, group_size, dtype)
        packed = ops.int4_sparse_prepack(w, scale, group_size)
        arguments = (x, packed, n, bias, group_size, dtype, bits, symmetric, "silu", None)
        expected = ops.int4_linear(x, cases4.nibbles(w), scale, None, bias, None, group_size, bits, symmetric, "silu")
        torch.testing.assert_close(OP.reference(*arguments), expected, rtol=2e-6, atol=2e-6)
        for path, y in on_every_path(*arguments):
            torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-6, msg=path)


@pytest.mark.parametrize("m", TOKENS)
def test_float64(m):
    """Each group's scale and each token's cost a rounding: the error is a few of them, of the sum of magnitudes."""
    n, k, group_size = 97, 520, 128
    w, scale = cases4.weight(n, k), cases4.scales(n, k, group_size)
    x = torch.randn(m, k, generator=cases.generator(m))
    q, s, z = quantize(to_float32(x), 8, True)
    a = torch.from_numpy((q - z.reshape(-1, 1)) * s.reshape(-1, 1).astype("float64"))
    wide = w.double() * scale.double().repeat_interleave(group_size, 1)[:, :k]
    magnitude = a.abs() @ wide.abs().t()
    for path, y in on_every_path(x, ops.int4_sparse_prepack(w, scale, group_size), n, None, group_size):
        assert ((y.double() - a @ wide.t()).abs() <= 8 * 2.0**-24 * magnitude).all(), path


@pytest.mark.parametrize("name", ["outlier", "max-float", "nan", "inf", "zeros", "zero-rows", "subnormal"])
def test_hostile_inputs(name):
    n, k, m = 33, 260, 19
    w = torch.where(torch.rand(n, k) < 0.5, -8, 7).to(torch.int8)
    scale = cases4.scales(n, k, 32)
    packed = ops.int4_sparse_prepack(w, scale, 32)
    x = cases.INPUTS[name](m, k, torch.float32)
    expected = ops.int4_linear(x, cases4.nibbles(w), scale, None, None, None, 32)
    for path, y in on_every_path(x, packed, n, None, 32):
        torch.testing.assert_close(y, expected, rtol=3e-6, atol=0, equal_nan=True, msg=path)


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_types_strides_and_residual(layout, dtype):
    n, k = 40, 70
    w, scale = cases4.weight(n, k), cases4.scales(n, k, 32)
    packed = ops.int4_sparse_prepack(w, scale, 32)
    x = cases.LAYOUTS[layout](torch.randn(12, k, generator=cases.generator(2)).to(dtype))
    residual = torch.randn(n, *x.shape[:-1], generator=cases.generator(3)).to(dtype).movedim(0, -1)
    expected = OP.reference(x, packed, n, None, 32, torch.float16, 8, True, "gelu", None, residual)
    for path, y in on_every_path(x, packed, n, None, 32, activation="gelu", residual=residual):
        assert y.dtype == dtype
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance, msg=path)


X = torch.randn(3, 70)
PACKED = ops.int4_sparse_prepack(cases4.weight(9, 70), cases4.scales(9, 70, 32), 32)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": X.double()}, TypeError, "x: got torch.float64"),
        ({"x": torch.randn(3, 600)}, ValueError, "kernel_weight"),
        ({"out_features": 4000}, ValueError, "kernel_weight"),
        ({"bias": torch.zeros(8)}, ValueError, "bias"),
        ({"group_size": 31}, ValueError, "group_size: got 31"),
        ({"act_bits": 9}, ValueError, "act_bits"),
        ({"act_bits": 8, "act_symmetric": False}, ValueError, "act_bits"),
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh'"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype: got torch.int32"),
        ({"residual": torch.zeros(3, 8)}, ValueError, "residual"),
    ],
)
def test_refused(change, error, text):
    arguments = {"x": X, "kernel_weight": PACKED, "out_features": 9, "group_size": 32} | change
    with pytest.raises(error, match=f"int4_sparse_linear: .*{text}"):
        ops.int4_sparse_linear(**arguments)
