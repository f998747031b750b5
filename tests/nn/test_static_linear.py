"""`QuantizedLinear` with static activations."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcompress import Scheme, backend, use_backend
from tcompress.nn import QuantizedLinear
from tcompress.nn.quantized_linear import multi_linear
from tcompress.quantize.observers import InputScale

SCHEMES = ("W8A8-static", "W8A7-static", "W7A7-static", "W6A7-static")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def input_scale(scheme, scale=0.03):
    symmetric = Scheme.named(scheme).activations.symmetric
    return InputScale(scale, None if symmetric else 50, -1.0, 1.0)


def pair(scheme="W8A8-static", k=37, n=29, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    return linear, QuantizedLinear.from_linear(linear, scheme, input_scale(scheme))


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(module, x):
    """In numpy: integers of the inputs and sums exactly, the rest in float64."""
    a = module.scheme.activations
    low, high = (1 - 2 ** (a.bits - 1), 2 ** (a.bits - 1) - 1) if a.symmetric else (0, 2**a.bits - 1)
    scale = module.input_scale.numpy()
    zero = 0 if a.symmetric else int(module.input_zero_point)
    rows = x.float().numpy().reshape(-1, x.shape[-1])
    q = np.clip(np.rint(rows * (np.float32(1) / scale)).astype(np.int64) + zero, low, high) - zero
    sums = q @ module.weight_packed.numpy().astype(np.int64).T
    y = sums * float(scale) * module.weight_scale.double().numpy()
    y = torch.from_numpy(y).view(*x.shape[:-1], y.shape[-1])
    return y if module.bias is None else y + module.bias.double()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(37,), (1, 37), (5, 37), (2, 3, 37), (0, 37)])
def test_result(shape, scheme, dtype, bias):
    _, module = pair(scheme, bias=bias)
    x = 2 * tokens(*shape, dtype=dtype)  # some of it is clipped
    y = module(x)
    assert y.dtype == dtype
    exact = expected(module, x)
    assert y.shape == exact.shape
    rounding = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}[dtype]
    assert ((y.double() - exact).abs() <= rounding * exact.abs() + 1e-5).all()
    with use_backend("reference"):
        reference = module(x)
    assert ((y - reference).abs() <= rounding * exact.abs() + 1e-6).all()


def test_two_tokens_have_one_scale():
    """What a token gives does not depend on its size relative to the others; what is beyond the range is clipped."""
    _, module = pair()
    x = tokens(1, 37)
    limit = 127 * float(module.input_scale)
    both = module(torch.cat([x, 100 * x]))
    assert torch.equal(both[:1], module(x))
    assert torch.equal(module(1000 * torch.ones(1, 37)), module(limit * torch.ones(1, 37)))


def test_activation_and_residual():
    _, module = pair()
    x, residual = tokens(4, 37), tokens(4, 29)
    fused = copy.deepcopy(module)
    fused.activation = "gelu"
    torch.testing.assert_close(fused(x, residual), F.gelu(module(x)) + residual, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_tokens_give_nan(bad):
    _, module = pair()
    x = tokens(3, 37)
    x[1, 5] = bad
    y = module(x)
    assert y[1].isnan().all()
    assert torch.equal(y[[0, 2]], module(tokens(3, 37))[[0, 2]])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_state_dict(scheme):
    _, module = pair(scheme)
    state = module.state_dict()
    zero_point = set() if module.scheme.activations.symmetric else {"input_zero_point"}
    assert set(state) == {"weight_packed", "weight_scale", "bias", "input_scale"} | zero_point
    assert state["input_scale"].shape == ()
    other = QuantizedLinear(37, 29, scheme=scheme)
    assert not torch.equal(other(tokens(2, 37)), module(tokens(2, 37)))
    other.load_state_dict(state)
    assert torch.equal(other(tokens(2, 37)), module(tokens(2, 37)))
    empty = QuantizedLinear(37, 29, scheme=scheme, device="meta")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(tokens(2, 37)), module(tokens(2, 37)))
    with pytest.raises(RuntimeError, match="input_scale"):
        other.load_state_dict({k: v for k, v in state.items() if k != "input_scale"})


@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_casts_leave_the_scale(scheme):
    _, module = pair(scheme)
    scale = module.input_scale.clone()
    for cast in (lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.float64), lambda m: m.to("cpu")):
        moved = cast(copy.deepcopy(module))
        assert moved.input_scale.dtype == torch.float32
        assert torch.equal(moved.input_scale, scale)
        assert "scale" in moved._buffers
    assert copy.deepcopy(module).to("meta").input_scale.device.type == "meta"


def test_repr():
    assert "scheme=W8A8-static" in repr(pair()[1])


@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_compile(scheme):
    _, module = pair(scheme)
    x = tokens(4, 37)
    with torch.no_grad():
        assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_layers_over_one_input():
    layers = [pair(seed=i)[1] for i in range(2)]
    x = tokens(3, 37)
    assert all(torch.equal(y, layer(x)) for y, layer in zip(multi_linear(x, layers), layers, strict=True))
    layers[0].activation = "silu"
    assert torch.equal(multi_linear(x, layers, gated=True)[0], layers[0](x) * layers[1](x))
    with pytest.raises(ValueError, match="multi_linear: layers: got .*, expected one scheme"):
        multi_linear(x, [layers[1], QuantizedLinear(37, 29, scheme="W8A8")])


def test_a_scale_is_of_static_schemes_only():
    linear, _ = pair()
    with pytest.raises(ValueError, match="QuantizedLinear: input_scale: got none, expected one, for W8A8-static"):
        QuantizedLinear.from_linear(linear, "W8A8-static")
    with pytest.raises(ValueError, match="QuantizedLinear: input_scale: got one, expected none, for W8A8"):
        QuantizedLinear.from_linear(linear, "W8A8", input_scale("W8A8-static"))


@pytest.mark.parametrize("scheme", SCHEMES[:2])
def test_integers_in_torch_give_the_same(scheme, monkeypatch):
    """The way on other devices: the integers in torch, then the op that takes integers."""
    _, module = pair(scheme)
    x, residual = tokens(5, 37), tokens(5, 29)
    fused = module(x, residual)
    called = []
    call = backend.call
    monkeypatch.setattr(backend, "forced", lambda: "triton")
    monkeypatch.setattr(backend, "call", lambda op, *args: called.append(op) or call(op, *args))
    assert torch.equal(module(x, residual), fused)
    assert called == ["int8_linear_quantized"]
