"""`SparseLinear`: the numbers of the dense layer in every layout, and a weight that nothing but loading changes."""

from __future__ import annotations

import pytest
import torch
from sparse_layers import (
    ACTIVATIONS,
    DTYPES,
    FLOATS,
    INTEGERS,
    KERNELS,
    PATTERNS,
    SCHEMES,
    assert_computes,
    assert_same_state,
    pruned,
    sparse,
    tokens,
)
from torch import nn
from torch.nn.utils import prune

import tcompress
from tcompress import Scheme, tune, use_backend
from tcompress.nn import SparseLinear
from tcompress.ops.sparse_prepack import LAYOUTS
from tcompress.packing import pack_sparse

# ---- the numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("bias", [True, False])
def test_every_layout(scheme, pattern, bias):
    linear = pruned(pattern=pattern, bias=bias)
    for layout in FLOATS if scheme is None else (*INTEGERS, *(["2:4"] if pattern == "2:4" else [])):
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
    def choose(weight, kernels, tokens=128, dtype=None):
        kernel = next(kernel for kernel in kernels if kernel.layout == layout)
        return tune.Choice(kernel, tokens, {kernel.layout: 1e-3 for kernel in kernels} | seconds, "measured")

    return choose


@pytest.mark.parametrize("pattern", ["unstructured", "8x4", "16x16"])
def test_the_smallest_pattern_is_found(pattern):
    linear = pruned(64, 64, pattern)
    module = sparse(linear)
    assert module.pattern == pattern
    assert module.packed.nbytes <= min(sparse(linear, pattern=other).packed.nbytes for other in ("1x4", "32x32"))


def test_the_2_4_kernel_takes_2_4_weights_only(monkeypatch):
    monkeypatch.setattr(tune, "choose", _choice_of("2:4"))
    linear = pruned(k=72, pattern="2:4")
    module = SparseLinear.from_linear(linear, "W8A8")
    assert (module.layout, module.pattern) == ("2:4", "2:4")
    assert_computes(module, linear, tokens(5, 72))
    with pytest.raises(
        ValueError, match="SparseLinear: layout: got '2:4', expected one of .*does not have this pattern"
    ):
        sparse(pruned(sparsity=0.2), "W8A8", "2:4")
    full = sparse(pruned(k=72, sparsity=0.2), "W8A8", pattern="unstructured")
    other = sparse(linear, "W8A8", "2:4", pattern="unstructured")
    with pytest.raises(RuntimeError, match="weight: SparseLinear: layout: got '2:4'"):
        other.load_state_dict(full.state_dict())
    assert torch.equal(other(tokens(5, 72)), module(tokens(5, 72)))


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_dense_layout_holds_the_weight_s_own_type(dtype):
    linear = pruned(64, 96, "unstructured").to(dtype)
    module = SparseLinear.from_linear(linear, layout="dense")
    assert module.kernel_weight.dtype == dtype
    x = tokens(5, 96).to(dtype)
    assert torch.equal(module(x), linear(x))
    assert torch.equal(module.packed.dequantize(), linear.weight)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (torch.ones(4), None, "weight: got 1 dimensions"),
        (torch.ones(2, 2, 2), None, "weight: got 3 dimensions"),
        (torch.ones(4, 8), torch.ones(5), r"bias: got \[5\], expected \[4\]"),
    ],
)
def test_wrong_shapes(weight, bias, message):
    with pytest.raises(ValueError, match=message):
        SparseLinear.from_weight(weight, bias)


def test_wrong_types():
    with pytest.raises(TypeError, match="weight"):
        SparseLinear.from_weight(torch.ones(4, 8, dtype=torch.float64), None)
    with pytest.raises(TypeError, match="tokens"):
        SparseLinear.from_weight(torch.ones(4, 8), None, tokens=2.5)


def test_measuring_under_other_defaults(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    linear = pruned(16, 32, "8x4")
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"):
            module = SparseLinear.from_linear(linear, tokens=4)
    finally:
        torch.set_default_dtype(before)
    assert_computes(module, linear, tokens(3, 32))
