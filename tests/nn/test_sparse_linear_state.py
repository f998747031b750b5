"""What `SparseLinear` holds: one copy of a weight that nothing but loading changes, and no state that does not fit."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from sparse_layers import DTYPES, KERNELS, PATTERNS, assert_computes, assert_same_state, pruned, sparse, tokens
from torch import nn

from tcompress import Scheme, tune
from tcompress.nn import QuantizedLinear, SparseLinear
from tcompress.packing import SparseWeight

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


@pytest.mark.parametrize("scheme", [None, "W8A8"])
def test_the_layout_of_another_device(monkeypatch, scheme):
    """Of a GPU's kernels, on the CPU: one of its own is chosen, and the layer keeps its layout for a return."""
    asked = []

    def choose(weight, kernels, tokens, dtype):
        asked.append((tokens, dtype))
        return tune.Choice(kernels[-1], tokens, {kernel.layout: 1e-3 for kernel in kernels}, "measured")

    linear = pruned()
    state = sparse(linear, scheme).state_dict()
    monkeypatch.setattr(tune, "choose", choose)
    module = sparse(linear, scheme, "gpu-16x16")
    assert asked == [(tune.TOKENS, torch.float32)]
    assert module.layout == "gpu-16x16"
    assert module._kernel.layout == "8x4"
    assert [(c.name, c.chosen) for c in module.explain().candidates if c.chosen] == [("8x4", True)]
    assert "gpu-16x16" not in str(module.explain())
    assert_computes(module, linear, tokens(3, 70))
    meta = copy.deepcopy(module).to("meta")
    meta.load_state_dict(state, assign=True)  # as a checkpoint is loaded
    assert meta._kernel.layout == "8x4"
    assert len(asked) == 2


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
