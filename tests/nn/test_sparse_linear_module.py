"""`SparseLinear`: the numbers of the dense layer in every layout, and a weight that nothing but loading changes."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import tcompress
from tcompress import Scheme, tune, use_backend
from tcompress.nn import QuantizedLinear, SparseLinear
from tcompress.ops.sparse_prepack import LAYOUTS
from tcompress.packing import SparseWeight, pack_sparse
from tcompress.prune import magnitude_mask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCHEMES = (None, "W8A8", "W7A7")
PATTERNS = ("unstructured", "2:4", "1x4", "8x4", "16x16")
FLOATS = ("dense", *LAYOUTS[torch.float32])
INTEGERS = ("dense", *LAYOUTS[torch.int8])
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"), "silu": F.silu}
#: Each layout of floats and integers.
KERNELS = [(None, layout) for layout in FLOATS] + [("W8A8", layout) for layout in INTEGERS]


def pruned(n=29, k=70, pattern="unstructured", sparsity=0.8, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    linear = nn.Linear(k, n, bias=bias, dtype=dtype)
    mask = magnitude_mask(linear.weight, pattern, None if ":" in pattern else sparsity)
    with torch.no_grad():
        linear.weight.mul_(mask)
    return linear


def sparse(linear=None, scheme=None, layout="dense", **kwargs):
    return SparseLinear.from_linear(pruned() if linear is None else linear, scheme, layout=layout, **kwargs)


def tokens(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def assert_computes(module, linear, x):
    """The quantized layer's numbers bit for bit, or those of the float layer as near as torch comes to them itself."""
    y = module(x)
    assert (y.dtype, y.shape) == (x.dtype, (*x.shape[:-1], module.out_features))
    if module.scheme is not None:
        assert torch.equal(y, QuantizedLinear.from_linear(linear, module.scheme)(x))
        return
    bias = None if linear.bias is None else linear.bias.double()
    exact = F.linear(x.double(), linear.weight.double(), bias)
    same = F.linear(x, linear.weight.to(x.dtype), None if bias is None else linear.bias.to(x.dtype))
    theirs = (same.double() - exact).norm()
    assert (y.double() - exact).norm() <= 4 * theirs + 1e-6 * exact.norm()


def assert_same_state(one, other):
    a, b = one.state_dict(), other.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype
        assert torch.equal(a[key], b[key]), key


# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout(scheme, pattern, bias):
    linear = pruned(pattern=pattern, bias=bias)
    for layout in FLOATS if scheme is None else INTEGERS:
        module = sparse(linear, scheme, layout)
        assert module.layout == layout
        assert_computes(module, linear, tokens(7, 70))
        assert_same_state(module, sparse(linear, scheme))  # the layout is the machine's, and not saved


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_types_of_weight_and_input(scheme, layout, dtype):
    linear = pruned(dtype=dtype)
    module = sparse(linear, scheme, layout)
    assert module.bias.dtype == dtype
    assert module.packed.values.dtype == (dtype if scheme is None else torch.int8)
    if scheme is None:
        assert torch.equal(module.packed.floats(), linear.weight)
        assert module.weight.dtype == dtype
    for x_dtype in DTYPES:
        assert_computes(module, linear, tokens(5, 70, dtype=x_dtype))


@pytest.mark.parametrize("shape", [(70,), (1, 70), (2, 3, 70), (2, 1, 3, 70), (0, 70), (2, 0, 70), (65, 70)])
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_shapes_of_the_input(scheme, layout, shape):
    linear = pruned()
    assert_computes(sparse(linear, scheme, layout), linear, tokens(*shape))


@pytest.mark.parametrize(("n", "k"), [(1, 64), (1, 1), (8, 4), (9, 5), (3, 257), (17, 31), (64, 256), (100, 2)])
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_sizes(scheme, layout, n, k):
    for pattern in ("unstructured", "8x4"):
        linear = pruned(n, k, pattern, 0.6)
        assert_computes(sparse(linear, scheme, layout), linear, tokens(5, k))


@pytest.mark.parametrize("kept", [0.0, 1.0])
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_nothing_or_everything_is_kept(scheme, layout, kept):
    linear = pruned(sparsity=1 - kept)
    assert float((linear.weight != 0).float().mean()) == pytest.approx(kept, abs=1e-3)
    module = sparse(linear, scheme, layout)
    assert_computes(module, linear, tokens(5, 70))
    if not kept:
        assert torch.equal(module(tokens(5, 70)), linear.bias.expand(5, 29))
        assert module.packed.values.numel() == 0


def test_strides_do_not_matter():
    for scheme, layout in KERNELS:
        module = sparse(None, scheme, layout)
        x = tokens(4, 6, 70)
        assert torch.equal(module(x.transpose(0, 1)), module(x.transpose(0, 1).contiguous()))
        assert torch.equal(module(x[:1].expand(3, 6, 70)), module(x[:1].expand(3, 6, 70).contiguous()))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_activation(scheme, layout, activation):
    plain = sparse(None, scheme, layout)
    module = SparseLinear(plain.packed, plain.bias, plain.scheme, layout, activation)
    x = tokens(9, 70) * 3
    torch.testing.assert_close(module(x), ACTIVATIONS[activation](plain(x)), rtol=1e-5, atol=2e-6)
    plain.fused_activation = activation
    assert torch.equal(plain(x), module(x))


@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_residual(scheme, layout):
    module, x = sparse(None, scheme, layout), tokens(4, 70)
    residual = tokens(4, 29)
    torch.testing.assert_close(module(x, residual), module(x) + residual, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match=r"SparseLinear: residual: got \[1, 29\], expected \[4, 29\]"):
        module(x, residual[:1])
    with pytest.raises(TypeError, match="SparseLinear: residual: got torch.bfloat16, expected torch.float32"):
        module(x, residual.bfloat16())


@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_wrong_input(scheme, layout):
    """The same in each layout: none takes what another refuses."""
    module = sparse(None, scheme, layout)
    with pytest.raises(ValueError, match=r"SparseLinear: input: got \[3, 71\], expected \[\.\.\., 70\]"):
        module(tokens(3, 71))
    with pytest.raises(TypeError, match="SparseLinear: input: got torch.int64, expected float32, bfloat16 or float16"):
        module(torch.ones(3, 70, dtype=torch.int64))
    with pytest.raises(TypeError, match="SparseLinear: input: got torch.float64"):
        module(tokens(3, 70).double())


@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_the_reference(scheme, layout):
    linear = pruned()
    module = sparse(linear, scheme, layout)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    x = tokens(5, 70)
    expected = module(x)
    with use_backend("reference"):
        if scheme is None:
            assert_computes(module, linear, x)
        else:
            assert torch.equal(module(x), expected)
        assert all(torch.equal(value, state[key]) for key, value in module.state_dict().items())
        made = sparse(linear, scheme, layout)  # where no kernel runs, the dense weight is multiplied
        assert_computes(made, linear, x)
        assert_same_state(made, module)
        assert made.layout == layout
    torch.testing.assert_close(made(x), expected, rtol=1e-5, atol=1e-6)


# ---- construction ---------------------------------------------------------------------------------------------------


def test_drop_in():
    linear = pruned().eval()
    module = SparseLinear.from_linear(linear)
    x = tokens(3, 70)
    assert torch.equal(module(x), module(input=x))
    assert (module.in_features, module.out_features, module.training) == (70, 29, False)
    assert SparseLinear.from_linear(pruned().train()).training
    assert not any(p.requires_grad for p in module.parameters())
    assert linear.bias.requires_grad
    with torch.no_grad():
        expected = module(x)
        linear.weight.zero_()
        linear.bias.zero_()
        assert torch.equal(module(x), expected)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_layout_is_measured(scheme):
    module = SparseLinear.from_linear(pruned(), scheme, tokens=3)
    assert module.layout == module.choice.kernel.layout
    assert set(module.choice.seconds) == set(FLOATS if scheme is None else INTEGERS)
    assert module.choice.tokens == 3
    assert sparse(layout="dense").choice is None


def test_dense_where_zeros_bring_no_speed(monkeypatch):
    monkeypatch.setattr(tune, "choose", _choice_of("dense"))
    linear = pruned()
    module = SparseLinear.from_linear(linear)
    assert module.layout == "dense"
    assert_computes(module, linear, tokens(5, 70))
    assert module.packed.nbytes < 0.4 * linear.weight.nbytes  # the file is smaller all the same


def _choice_of(layout, **seconds):
    def choose(weight, kernels, tokens=128):
        kernel = next(kernel for kernel in kernels if kernel.layout == layout)
        return tune.Choice(kernel, tokens, {kernel.layout: 1e-3 for kernel in kernels} | seconds, "measured")

    return choose


@pytest.mark.parametrize("pattern", ["unstructured", "8x4", "16x16"])
def test_the_smallest_pattern_is_found(pattern):
    linear = pruned(64, 64, pattern)
    module = sparse(linear)
    assert module.pattern == pattern
    assert module.packed.nbytes <= min(sparse(linear, pattern=other).packed.nbytes for other in ("1x4", "32x32"))


def test_2_4_is_found():
    module = sparse(pruned(k=72, pattern="2:4"))
    assert module.pattern == "2:4"
    assert list(module.state_dict()) == ["bias", "weight_values", "weight_positions"]


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scheme", [None, "W8A8"])
def test_a_pattern_that_is_asked_for(scheme, pattern):
    linear = pruned(pattern="2:4")
    module = sparse(linear, scheme, pattern=pattern)
    assert module.pattern == module.packed.pattern == pattern
    assert_computes(module, linear, tokens(3, 70))


def test_weights_that_are_not_a_plain_parameter():
    linear = prune.l1_unstructured(nn.Linear(12, 5), "weight", 0.5)
    with torch.no_grad():
        linear.weight_orig.mul_(2)  # `linear.weight` follows at the next call only
    module = sparse(linear)
    x = tokens(3, 12)
    torch.testing.assert_close(module(x), linear(x))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_are_not_finite(scheme, value):
    linear = pruned()
    linear.weight.data[2, 3] = value
    with pytest.raises(ValueError, match="SparseLinear: weight: got NaN or infinity, expected finite values"):
        sparse(linear, scheme)


@pytest.mark.parametrize("scheme", ["W8A16", "W4A8", "W4A16-g32"])
def test_schemes_without_8_bit_products(scheme):
    with pytest.raises(ValueError, match=f"SparseLinear: scheme: got {scheme}, expected 5 to 8 bits for weights and"):
        sparse(scheme=scheme)
    packed = sparse(scheme="W8A8").packed
    with pytest.raises(ValueError, match="SparseLinear: "):
        SparseLinear(packed, None, Scheme.named(scheme))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="SparseLinear: activation: got 'tanh', expected one of .*'relu'"):
        SparseLinear(sparse().packed, activation="tanh")
    with pytest.raises(ValueError, match="SparseLinear: layout: got '1x4', expected one of .*'unstructured'"):
        sparse(layout="1x4")
    with pytest.raises(ValueError, match="SparseLinear: layout: got 'unstructured', expected one of .*'1x4'"):
        sparse(scheme="W8A8", layout="unstructured")
    with pytest.raises(ValueError, match="packed, scheme: got 8-bit values with no scheme"):
        SparseLinear(sparse(scheme="W8A8").packed)
    with pytest.raises(ValueError, match="packed, scheme: got 32-bit values with W8A8"):
        SparseLinear(sparse().packed, scheme=Scheme.named("W8A8"))
    int4 = pack_sparse(torch.ones(2, 4, dtype=torch.int8), "1x4", scale=torch.ones(2, 1), bits=4, group_size=4)
    with pytest.raises(ValueError, match="packed, scheme: got 4-bit values with no scheme"):
        SparseLinear(int4)
    with pytest.raises(ValueError, match="2:4"):
        sparse(pattern="2:4")
    with pytest.raises(ValueError, match="got 'diagonal'"):
        sparse(pattern="diagonal")
    with pytest.raises(TypeError, match="float64"):
        sparse(pruned(dtype=torch.float64))
    with pytest.raises(ValueError, match="tune: tokens: got 0"):
        sparse(layout="auto", tokens=0)


def test_backward_raises():
    for layout in LAYOUTS[torch.float32]:
        with pytest.raises(RuntimeError, match="inference only"):
            sparse(layout=layout)(tokens(3, 70).requires_grad_()).sum().backward()


def test_repr():
    module = sparse(scheme="W8A8", layout="1x4", pattern="1x4")
    text = "in_features=70, out_features=29, bias=True, scheme=W8A8, pattern=1x4, layout=1x4"
    assert repr(module) == f"SparseLinear({text})"
    module.fused_activation = "gelu"
    assert module.extra_repr() == f"{text}, activation=gelu"
    assert "scheme=None, pattern=unstructured, layout=dense" in repr(sparse())


# ---- memory, casts, devices -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_a_weight_is_held_once(scheme, layout):
    module = sparse(pruned(256, 256, "8x4", 0.9), scheme, layout)
    held = sum(buffer.nbytes for buffer in module.buffers())
    dense = 256 * 256 * (4 if scheme is None else 1)
    assert held <= (1.1 if layout == "dense" else 0.4) * dense + 2048
    assert module.values is module.index is None
    assert module.weight.untyped_storage().nbytes() == module.weight.element_size()
    assert module.weight.shape == (256, 256)


@pytest.mark.parametrize(
    ("change", "dtype"),
    [
        (lambda m: m.half(), torch.float16),
        (lambda m: m.bfloat16(), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float16), torch.float16),
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half().float(), torch.float32),
    ],
)
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_a_cast_keeps_the_weight(scheme, layout, change, dtype):
    linear = pruned()
    module, expected = sparse(linear, scheme, layout), sparse(linear, scheme, layout)
    change(module)
    assert module.bias.dtype == dtype
    assert module.weight.dtype == (dtype if scheme is None else torch.int8)  # models cast their input to it
    assert torch.equal(module.kernel_weight, expected.kernel_weight)
    a, b = module.packed, expected.packed
    assert (a.values.dtype, a.nbytes) == (b.values.dtype, b.nbytes)
    assert torch.equal(a.dequantize(), b.dequantize())
    assert module(tokens(3, 70, dtype=torch.float16)).dtype == torch.float16
    if dtype == torch.float32:
        module.bias = expected.bias  # it was rounded on the way
        assert torch.equal(module(tokens(3, 70)), expected(tokens(3, 70)))


@pytest.mark.parametrize("cast", [None, torch.float16])
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_meta_device_and_back(scheme, layout, cast):
    module = sparse(None, scheme, layout)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    expected = module(tokens(3, 70))
    module.to("meta", cast)
    assert module.kernel_weight is None
    assert {t.device.type for t in module.state_dict().values()} == {module.weight.device.type} == {"meta"}
    assert {key: (v.shape, v.dtype) for key, v in module.state_dict().items() if "weight" in key} == {
        key: (v.shape, v.dtype) for key, v in state.items() if "weight" in key
    }
    with pytest.raises(RuntimeError, match="SparseLinear: weight: got none .the meta device., expected a loaded"):
        module(tokens(3, 70))
    with pytest.raises(RuntimeError, match="the meta device"):
        module.explain()
    with pytest.raises(NotImplementedError, match="to_empty"):
        module.to("cpu")
    assert module.weight.device.type == "meta"  # unharmed
    module.to_empty(device="cpu")
    assert module.weight.device.type == module.kernel_weight.device.type == "cpu"
    module.load_state_dict(state, assign=True)
    assert torch.equal(module(tokens(3, 70)), expected)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_to_empty_gives_no_error(pattern):
    module = sparse(pruned(pattern=pattern), pattern=pattern).to("meta").to_empty(device="cpu")
    assert module(tokens(2, 70)).shape == (2, 29)
    assert module.pattern == pattern


def test_from_the_meta_device_by_loading():
    module = sparse(scheme="W8A8", layout="8x4")
    state = module.state_dict()
    empty = copy.deepcopy(module).to("meta")
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(tokens(3, 70)), module(tokens(3, 70)))


# ---- state ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "sparsity", "keys"),
    [
        (None, 0.5, ["bias", "weight_values", "weight_bitmap"]),
        (None, 0.97, ["bias", "weight_values", "weight_delta"]),
        ("W8A8", 0.5, ["bias", "weight_values", "weight_bitmap", "weight_scale"]),
        ("W7A7", 0.97, ["bias", "weight_values", "weight_delta", "weight_scale"]),
    ],
)
def test_state_dict_keys(scheme, sparsity, keys):
    module = sparse(pruned(64, 64, sparsity=sparsity), scheme, pattern="unstructured")
    assert list(module.state_dict()) == keys
    assert "kernel_weight" in dict(module.named_buffers())


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_state_dict_round_trip(scheme, layout, dtype, assign):
    """Into a layer with other zeros: sizes and the kind of the index follow what is loaded."""
    module = sparse(pruned(64, 64, sparsity=0.95, dtype=dtype), scheme, layout, pattern="unstructured")
    other = sparse(pruned(64, 64, sparsity=0.3, dtype=dtype), scheme, layout, pattern="unstructured")
    assert module.state_dict().keys() != other.state_dict().keys()
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert_same_state(module, other)
    x = tokens(4, 64)
    assert torch.equal(module(x), other(x))
    assert other.choice is None


def test_loading_copies():
    module, other = sparse(scheme="W8A8"), sparse(scheme="W8A8")
    state = module.state_dict()
    other.load_state_dict(state)
    x = tokens(3, 70)
    expected = other(x)
    for value in state.values():
        value.zero_()
    assert torch.equal(other(x), expected)


def test_loading_inside_a_model():
    model, other = nn.Sequential(sparse(), nn.ReLU()), nn.Sequential(sparse(pruned(sparsity=0.5)), nn.ReLU())
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(tokens(3, 70)), model(tokens(3, 70)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_copies(scheme, layout, copied):
    module = sparse(None, scheme, layout)
    clone = copied(module)
    assert_same_state(module, clone)
    ours, theirs = ({t.data_ptr() for t in (*m.parameters(), *m.buffers())} for m in (module, clone))
    assert not ours & theirs
    assert torch.equal(module(tokens(3, 70)), clone(tokens(3, 70)))


def test_whole_module_saved_by_torch(tmp_path):
    module = sparse(layout="auto")
    torch.save(module, tmp_path / "m.pt")
    loaded = torch.load(tmp_path / "m.pt", weights_only=False)
    assert torch.equal(loaded(tokens(3, 70)), module(tokens(3, 70)))
    assert loaded.choice == module.choice


def _without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


def _with(**changes):
    return lambda state: state | changes


#: What to change in the state of a layer with a bitmap, and what is said.
DAMAGE = {
    "no values": (_without("weight_values"), "Missing key.*weight_values"),
    "no index": (_without("weight_bitmap"), "Missing key.*weight_bitmap"),
    "no scale": (_without("weight_scale"), "Missing key.*weight_scale"),
    "no bias": (_without("bias"), "Missing key.*bias"),
    "a dense weight": (_with(weight=torch.zeros(29, 70)), "Unexpected key.*weight"),
    "two indices": (_with(weight_delta=torch.zeros(3, dtype=torch.uint8)), "Unexpected key.*weight_delta"),
    "positions": (
        lambda s: _without("weight_bitmap")(s) | {"weight_positions": s["weight_bitmap"]},
        'index_kind: got .positions., expected "bitmap" or "delta"',
    ),
    "truncated index": (lambda s: s | {"weight_bitmap": s["weight_bitmap"][:-1]}, "decode_index: index: got 253 bytes"),
    "empty index": (lambda s: s | {"weight_bitmap": s["weight_bitmap"][:0]}, "decode_index: index: got 0 bytes"),
    "index of other values": (lambda s: s | {"weight_bitmap": torch.zeros_like(s["weight_bitmap"])}, "values"),
    "full index": (lambda s: s | {"weight_bitmap": torch.full_like(s["weight_bitmap"], 255)}, "set after the first"),
    "truncated values": (lambda s: s | {"weight_values": s["weight_values"][:-1]}, "values: got"),
    "values of another type": (
        lambda s: s | {"weight_values": s["weight_values"].float()},
        "values: got torch.float32",
    ),
    "index of another type": (lambda s: s | {"weight_bitmap": s["weight_bitmap"].int()}, "torch.int32"),
    "index of two dimensions": (lambda s: s | {"weight_bitmap": s["weight_bitmap"][None]}, "index: got .1, 254., expe"),
    "scale of another size": (lambda s: s | {"weight_scale": s["weight_scale"][:-1]}, "scale: got .28., expected .29."),
    "scale of another type": (lambda s: s | {"weight_scale": s["weight_scale"].half()}, "scale: got torch.float16"),
    "bias of another size": (lambda s: s | {"bias": s["bias"][:-1]}, "size mismatch for bias"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_state_dict_that_does_not_fit(what):
    damage, text = DAMAGE[what]
    linear = pruned(sparsity=0.5)
    module, fresh = sparse(linear, "W8A8", "1x4", pattern="unstructured"), sparse(linear, "W8A8", "1x4")
    with pytest.raises(RuntimeError, match=text):
        module.load_state_dict(damage(module.state_dict()))
    assert torch.equal(module(tokens(3, 70)), fresh(tokens(3, 70)))  # it holds what it held


@pytest.mark.parametrize(
    ("index", "text"),
    [
        ([255], "a gap that goes on at the end"),
        ([255] * 20 + [0], "position"),
        ([250, 250, 250, 250, 250, 250, 250, 250, 250], "position"),
        ([0, 0], "values"),
    ],
)
def test_a_malformed_delta_index(index, text):
    module = sparse(pruned(sparsity=0.97), pattern="unstructured")
    state = module.state_dict()
    assert "weight_delta" in state
    values = torch.ones(len(index) if text != "values" else 5)
    with pytest.raises(RuntimeError, match=text):
        module.load_state_dict(
            state | {"weight_delta": torch.tensor(index, dtype=torch.uint8), "weight_values": values}
        )


def test_a_scale_for_floats():
    module = sparse()
    with pytest.raises(RuntimeError, match="scale"):
        module.load_state_dict(module.state_dict() | {"weight_scale": torch.ones(29)})


def test_a_state_dict_of_another_layer():
    module = sparse(scheme="W8A8", pattern="unstructured")
    for other in (sparse(), pruned(), QuantizedLinear.from_linear(pruned()), sparse(pruned(30), "W8A8")):
        with pytest.raises(RuntimeError, match="Error.s. in loading state_dict"):
            module.load_state_dict(other.state_dict())
    result = module.load_state_dict({"bias": module.bias}, strict=False)
    assert result.missing_keys == ["weight_values", "weight_scale", f"weight_{module.packed.index_kind}"]


def test_a_malformed_weight_in_the_constructor():
    packed = sparse(scheme="W8A8", pattern="unstructured").packed
    broken = SparseWeight(
        packed.values, packed.index[:-1], packed.index_kind, packed.shape, packed.pattern, 8, packed.scale
    )
    with pytest.raises(ValueError, match="index"):
        SparseLinear(broken, None, Scheme.named("W8A8"))


# ---- explain, compile, export ---------------------------------------------------------------------------------------


def test_explain_names_the_candidates_and_their_times(monkeypatch):
    monkeypatch.setattr(tune, "choose", _choice_of("8x4", dense=2e-3, unstructured=3e-3, **{"8x4": 1e-3}))
    module = SparseLinear.from_linear(pruned())
    explanation = tcompress.explain(module)
    assert (explanation.op, explanation.backend) == ("SparseLinear", "cpu")
    assert explanation.path == tcompress.backend.cpu_path()
    assert [(c.name, c.chosen, c.reason) for c in explanation.candidates] == [
        ("8x4", True, "1.0000 ms for 128 tokens (measured)"),
        ("dense", False, "2.0000 ms for 128 tokens (measured)"),
        ("unstructured", False, "3.0000 ms for 128 tokens (measured)"),
    ]
    assert "* 8x4" in str(explanation)


def test_explain_of_a_layout_that_was_given():
    (candidate,) = tcompress.explain(sparse(layout="8x4")).candidates
    assert (candidate.name, candidate.chosen, candidate.reason) == ("8x4", True, "given")


def test_explain_tells_what_runs_where_no_kernel_can():
    module = sparse(layout="8x4")
    with use_backend("reference"):
        explanation = tcompress.explain(module)
        assert (explanation.backend, explanation.path) == ("reference", None)
        made = tcompress.explain(sparse(layout="8x4")).candidates
        assert str(tcompress.explain(SparseLinear.from_linear(pruned()))).endswith("* dense  the only one")
    assert [(c.name, c.chosen) for c in made] == [("8x4", False), ("dense", True)]
    assert "no kernel could run 8x4" in made[1].reason


def test_explain_of_other_modules():
    with pytest.raises(
        ValueError, match="explain: op: got Linear, expected an op, or a module that chooses its kernel"
    ):
        tcompress.explain(nn.Linear(2, 2))


@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_compile(scheme, layout):
    torch._dynamo.reset()
    module = sparse(None, scheme, layout)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (3, 5):
            x, residual = tokens(rows, 70), tokens(rows, 29)
            assert torch.equal(compiled(x), module(x))
            assert torch.equal(compiled(x, residual), module(x, residual))


@pytest.mark.slow
@pytest.mark.parametrize(("scheme", "layout"), KERNELS)
def test_compile_with_inductor(scheme, layout):
    torch._dynamo.reset()
    module = sparse(None, scheme, layout)
    x = tokens(3, 70)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(module, fullgraph=True)(x), module(x))
