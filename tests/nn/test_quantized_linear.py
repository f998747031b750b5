import copy
import io
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcompress import QuantArgs, Scheme, _extension, use_backend
from tcompress.nn import QuantizedLinear
from tcompress.packing import unpack_int4
from tcompress.quantize import PerToken

EIGHT_BITS = ("W8A8", "W8A7", "W7A7")
FOUR_BITS = ("W4A8", "W4A7", "W4A8-g32", "W4A8-asym", "W4A7-g32-asym", "W4A16-g32", "W4A16-g64-asym")
SCHEMES = (*EIGHT_BITS, "W6A7", *FOUR_BITS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
#: Half a unit in the last place, of the types that results are rounded to.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def pair(k=37, n=29, bias=True, scheme="W8A8", dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    return linear, QuantizedLinear.from_linear(linear, scheme)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def error_bound(module, x):
    """How far an output may be from x Ŵᵀ + b: each activation is off by half a step of its token; float32 rounds."""
    x = x.double()
    lo, hi = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    activations = module.scheme.activations
    step = torch.zeros_like(lo)
    if activations is not None:
        step = x.abs().amax(-1, keepdim=True) / 127 if activations.symmetric else (hi - lo) / 127
    weight = module.packed.dequantize().double()
    exact = x @ weight.t() + (0 if module.bias is None else module.bias.double())
    return exact, step / 2 * 1.001 * weight.abs().sum(1) + 1e-6


def assert_same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


def assert_kernel_weight_fits(module):
    """The layout drawn in csrc/cpu/int8_linear.h, element by element, and the sums behind it."""
    n, k = module.weight_packed.shape
    n_padded, k_padded = -(-n // 16) * 16, -(-k // 4) * 4
    kernel = module.kernel_weight
    steps = k_padded // 4
    used = n_padded * (k_padded + 4) + -(-n_padded // 48) * steps
    assert kernel.shape == (used + -used % 4,)
    i, j = torch.meshgrid(torch.arange(n), torch.arange(k), indexing="ij")
    width = (n_padded - i // 48 * 48).clamp_max(48)
    at = i // 48 * 48 * k_padded + (j // 4) * width * 4 + (i % 48) * 4 + j % 4
    assert torch.equal(kernel[at], module.weight_packed)
    sums = kernel[n_padded * k_padded :][: 4 * n_padded].clone().view(torch.int32)
    assert torch.equal(sums[:n].long(), module.weight_packed.long().sum(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("shape", [(37,), (1, 37), (5, 37), (2, 3, 37), (2, 1, 3, 37), (0, 37), (2, 0, 37)])
def test_result(shape, scheme, dtype, bias):
    _, module = pair(bias=bias, scheme=scheme)
    x = tokens(*shape, dtype=dtype)
    y = module(x)
    assert y.shape == (*shape[:-1], 29)
    assert y.dtype == dtype
    if y.numel():
        exact, bound = error_bound(module, x)
        assert ((y.double() - exact).abs() <= bound + exact.abs() * 1.01 * ROUNDING[dtype]).all()


def test_any_scheme_with_quantized_activations():
    activations = QuantArgs(bits=4, symmetric=True, granularity=PerToken(), dynamic=True)
    _, module = pair(scheme=Scheme(weights=QuantArgs(bits=3), activations=activations))
    assert module.packed.layout == "int4"
    assert (unpack_int4(module.weight_packed, 37).int() - 8).abs().max() == 3
    x = tokens(5, 37)
    exact, bound = error_bound(module, x)
    error = (module(x).double() - exact).abs()
    assert (error <= bound * 127 / 7).all()
    assert (error > bound).any()  # four bits are coarser than eight: the scheme's bits are used


def test_strides_do_not_matter():
    _, module = pair()
    x = tokens(4, 6, 37)
    strided = x.transpose(0, 1)
    assert torch.equal(module(strided), module(strided.contiguous()))
    expanded = x[:1].expand(3, 6, 37)
    assert torch.equal(module(expanded), module(expanded.contiguous()))


def test_a_token_does_not_depend_on_the_others():
    _, module = pair(scheme="W8A7")
    x = tokens(6, 37)
    y = module(x)
    for i in range(6):
        assert torch.equal(module(x[i]), y[i])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_bad_token_is_nan_and_harms_no_other(bad, scheme):
    _, module = pair(scheme=scheme)
    x = tokens(3, 37)
    expected = module(x)
    x[1, 4] = bad
    y = module(x)
    assert (~torch.isfinite(y[1]) if "A16" in scheme else torch.isnan(y[1])).all()  # A16: what torch gives
    assert torch.equal(y[[0, 2]], expected[[0, 2]])


def rms_errors(scheme, x):
    linear, module = pair(256, 192, scheme=scheme)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(copy.deepcopy(linear))
        peer = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        theirs = peer(x).double()
    expected = F.linear(x.double(), linear.weight.double(), linear.bias.double())
    ours = (module(x).double() - expected).square().mean().sqrt()
    return ours, (theirs - expected).square().mean().sqrt(), expected


@pytest.mark.parametrize("kind", ["gaussian", "one-sided", "outliers"])
@pytest.mark.parametrize("scheme", EIGHT_BITS)
def test_error_to_the_float_layer(scheme, kind):
    x = tokens(64, 256)
    if kind == "one-sided":
        x = F.relu(x)
    if kind == "outliers":
        x[::7] *= 100
    ours, theirs, expected = rms_errors(scheme, x)
    assert ours <= 2 * theirs
    assert ours <= 0.03 * expected.square().mean().sqrt()


@pytest.mark.parametrize("scheme", FOUR_BITS)
def test_error_of_four_bits(scheme):
    """About a step of 1/7 of the range over the square root of 12, whatever the activations have."""
    ours, _, expected = rms_errors(scheme, tokens(64, 256))
    assert ours <= (0.12 if "-g" in scheme else 0.16) * expected.square().mean().sqrt()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_fused_activation(activation, bias):
    plain = pair(bias=bias)[1]
    module = QuantizedLinear(37, 29, bias, activation=activation)
    module.load_state_dict(plain.state_dict())
    x = tokens(9, 37) * 3
    expected = ACTIVATIONS[activation](plain(x).double())
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(module(x), plain(x))


def test_drop_in_signature():
    linear, module = pair()
    x = tokens(3, 37)
    assert torch.equal(module(x), module(input=x))
    assert (module.in_features, module.out_features) == (linear.in_features, linear.out_features)
    made = QuantizedLinear(37, 29, True, device="cpu", dtype=torch.bfloat16)
    assert made.bias.dtype == torch.bfloat16
    assert made(x).eq(0).all()
    assert QuantizedLinear(37, 29, bias=False).bias is None


def test_default_scheme():
    assert QuantizedLinear(2, 3).scheme is QuantizedLinear.from_linear(nn.Linear(2, 3)).scheme
    assert QuantizedLinear(2, 3).scheme.name == "W8A8"


@pytest.mark.parametrize("training", [True, False])
def test_training_flag_and_no_trainable_parameters(training):
    linear = nn.Linear(5, 4).train(training)
    module = QuantizedLinear.from_linear(linear)
    assert module.training is training
    assert not any(p.requires_grad for p in module.parameters())
    assert linear.bias.requires_grad


def test_the_float_layer_is_not_shared():
    linear, module = pair()
    before = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.zero_()
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())


@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_keeps_the_type_of_the_float_layer(dtype):
    linear, module = pair(dtype=dtype)
    assert module.bias.dtype == dtype
    assert torch.equal(module.bias, linear.bias)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half().float(), torch.float32),
    ],
)
def test_casting_changes_the_bias_only(change, dtype):
    _, module = pair()
    scale, packed, kernel = (t.clone() for t in (module.weight_scale, module.weight_packed, module.kernel_weight))
    change(module)
    assert module.bias.dtype == dtype
    assert module.weight_scale.dtype == torch.float32
    assert torch.equal(module.weight_scale, scale)
    assert torch.equal(module.weight_packed, packed)
    assert torch.equal(module.kernel_weight, kernel)
    y = module(tokens(3, 37, dtype=torch.float16))
    assert y.dtype == torch.float16


def test_cast_inside_a_model():
    model = nn.Sequential(pair()[1], nn.LayerNorm(29)).bfloat16()
    assert model[0].weight_scale.dtype == torch.float32
    assert model(tokens(3, 37, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_keys():
    zero_points = pair(scheme="W4A8-g32-asym")[1].state_dict()
    assert list(zero_points) == ["bias", "weight_packed", "weight_scale", "weight_zero_point"]
    assert list(pair()[1].state_dict()) == ["bias", "weight_packed", "weight_scale"]
    assert list(pair(bias=False)[1].state_dict()) == ["weight_packed", "weight_scale"]
    assert "kernel_weight" in dict(pair()[1].named_buffers())


@pytest.mark.parametrize("shape", [(37, 29), (1, 1), (64, 32), (3, 17)])
def test_kernel_weight(shape):
    assert_kernel_weight_fits(pair(*shape)[1])


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("scheme", ["W8A8", "W4A8-g32", "W4A16-g64-asym"])
def test_state_dict_round_trip(assign, bias, device, scheme):
    if device == "meta" and not assign:
        assign = True  # copying into a meta tensor does nothing, in torch too
    _, module = pair(bias=bias, scheme=scheme, dtype=torch.bfloat16)
    other = QuantizedLinear(37, 29, bias, scheme, dtype=torch.bfloat16, device=device)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert_same_state(module, other)
    if scheme == "W8A8":
        assert_kernel_weight_fits(other)
    x = tokens(4, 37)
    assert torch.equal(module(x), other(x))


def test_loading_reaches_the_kernel_inside_a_model():
    model = nn.Sequential(pair()[1])
    x = tokens(4, 37)
    before = model(x)
    state = {key: -value if key.endswith("packed") else value for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert_kernel_weight_fits(model[0])
    bias = model[0].bias
    torch.testing.assert_close(model(x) - bias, bias - before)


def test_a_state_dict_that_does_not_fit():
    _, module = pair()
    with pytest.raises(RuntimeError, match="weight_packed"):
        module.load_state_dict(pair(36)[1].state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        module.load_state_dict(pair()[0].state_dict())
    assert_kernel_weight_fits(module)  # torch loads what fits before it raises; the two layouts must still agree
    assert module.weight_packed.shape == (29, 37)


def test_deepcopy():
    _, module = pair()
    clone = copy.deepcopy(module)
    assert_same_state(module, clone)
    ours, theirs = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (module, clone))
    assert not ours & theirs
    x = tokens(3, 37)
    assert torch.equal(module(x), clone(x))


def test_meta_device():
    module = QuantizedLinear(6, 5, device="meta")
    assert module.kernel_weight is None
    y = module(torch.empty(2, 6, device="meta"))
    assert (y.device.type, y.shape) == ("meta", (2, 5))
    assert module.to_empty(device="cpu").kernel_weight.device.type == "cpu"
    moved = pair()[1].to("meta")
    assert moved.kernel_weight is None
    assert moved.weight_scale.device.type == "meta"


def test_packed():
    _, module = pair()
    packed = module.packed
    assert torch.equal(packed.qdata, module.weight_packed)
    assert packed.scale is module.weight_scale
    assert packed.shape == (29, 37)
    assert torch.equal(QuantizedLinear.from_packed(packed, None, module.scheme).weight_packed, packed.qdata)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_weight_is_held_once(scheme):
    _, module = pair(256, 96, scheme=scheme)
    held = sum(b.nbytes for b in module.buffers())
    assert held <= 1.1 * module.packed.nbytes
    assert module.qdata is None
    assert module.weight.untyped_storage().nbytes() == 1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_without_kernels(scheme, monkeypatch):
    """The storage layout stays, and gives the same result on the reference."""
    linear, module = pair(scheme=scheme)
    monkeypatch.setattr(_extension, "C", None)
    plain = QuantizedLinear.from_linear(linear, scheme)
    monkeypatch.undo()
    assert plain.kernel_weight is None
    x = tokens(4, 37)
    with use_backend("reference"):
        assert torch.equal(plain(x), module(x))  # one reads the storage layout, the other unpacks the kernel layout
    assert_same_state(plain, module)


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8-g32-asym"])
def test_there_and_back(scheme):
    _, module = pair(scheme=scheme)
    state = {k: v.clone() for k, v in module.state_dict().items()}
    module.to("meta")
    assert module.kernel_weight is None
    assert module.qdata.device.type == module.weight.device.type == "meta"
    module.to_empty(device="cpu")
    module.load_state_dict(state)
    x = tokens(4, 37)
    assert torch.equal(module(x), pair(scheme=scheme)[1](x))


@pytest.mark.parametrize("scheme", ["W8A8", "W4A8-g32"])
def test_residual(scheme):
    _, module = pair(scheme=scheme)
    x, residual = tokens(4, 37), tokens(4, 29)
    assert torch.equal(module(x, residual), module(x) + residual)


def test_weight_answers_for_type_and_device_and_is_of_no_use_in_a_product():
    _, module = pair()
    assert module.weight.dtype == torch.int8
    assert module.weight.shape == (29, 37)
    with pytest.raises(RuntimeError):
        F.linear(tokens(3, 37), module.weight)


def test_extra_repr():
    assert repr(pair()[1]) == "QuantizedLinear(in_features=37, out_features=29, bias=True, scheme=W8A8)"
    module = QuantizedLinear(2, 3, False, "W7A7", activation="gelu")
    assert module.extra_repr() == "in_features=2, out_features=3, bias=False, scheme=W7A7, activation=gelu"


def test_wrong_construction():
    with pytest.raises(ValueError, match=r"QuantizedLinear: scheme: got W8A16, expected quantized activations; "):
        QuantizedLinear(2, 3, scheme="W8A16")
    with pytest.raises(ValueError, match=r"Scheme: name: got 'W1A1', expected one of"):
        QuantizedLinear(2, 3, scheme="W1A1")
    with pytest.raises(ValueError, match=r"QuantizedLinear: activation: got 'tanh', expected one of .*'relu'"):
        QuantizedLinear(2, 3, activation="tanh")
    linear = nn.Linear(2, 3)
    nn.init.constant_(linear.weight, float("nan"))
    with pytest.raises(ValueError, match="got 6 values NaN or infinite, expected finite"):
        QuantizedLinear.from_linear(linear)


def test_wrong_input():
    _, module = pair()
    with pytest.raises(ValueError, match=r"QuantizedLinear: input: got \[3, 38\], expected \[\.\.\., 37\]"):
        module(tokens(3, 38))  # the layout pads 37 to 40
    with pytest.raises(TypeError, match=r"int8_linear: x: got torch\.float64, expected float32"):
        module(tokens(3, 37).double())
    with pytest.raises(TypeError, match=r"int8_linear: x: got torch\.int64"):
        module(torch.zeros(3, 37, dtype=torch.int64))


def test_backward_raises():
    _, module = pair()
    y = module(tokens(3, 37).requires_grad_())
    with pytest.raises(RuntimeError, match="inference only"):
        y.sum().backward()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_compile(scheme):
    torch._dynamo.reset()
    _, module = pair(scheme=scheme)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for rows in (3, 5):
        x = tokens(rows, 37)
        assert torch.equal(compiled(x), module(x))


@pytest.mark.slow
def test_compile_with_inductor():
    torch._dynamo.reset()
    _, module = pair()
    compiled = torch.compile(module, fullgraph=True)
    x = tokens(3, 37)
    assert torch.equal(compiled(x), module(x))
