"""Int8Attention: quantized and in floating point, against attention computed by hand in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from tcompress.nn import Int8Attention
from tcompress.ops import quantized_attention


def inputs(b=2, h=4, hkv=4, sq=5, skv=7, d=16, dv=16, dtype=torch.float32):
    torch.manual_seed(0)
    return tuple(torch.randn(size, dtype=dtype) for size in ((b, h, sq, d), (b, hkv, skv, d), (b, hkv, skv, dv)))


def by_hand(q, k, v, mask=None, is_causal=False, scale=None, window=None, softcap=None, enable_gqa=False):
    """softmax(scale·q kᵀ + mask) v, key by key; a query without keys gives zeros."""
    q, k, v = (x.double() for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    (b, h, sq, d), skv = q.shape, k.shape[2]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * (1 / math.sqrt(d) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = torch.ones(b, h, sq, skv, dtype=torch.bool)
    for i in range(sq):
        position = i + (skv - sq if is_causal == "bottom_right" else 0)
        left, right = (window - 1, window - 1) if isinstance(window, int) else window or (-1, -1)
        for j in range(skv):
            near = (left < 0 or j >= position - left) and (right < 0 or j <= position + right)
            visible[:, :, i, j] = near and not (is_causal and j > position)
    if mask is not None and mask.dtype == torch.bool:
        visible = visible & mask
    elif mask is not None:
        scores = scores + mask.double()
        visible = visible & (mask != -math.inf)
    scores = torch.where(visible, scores, -math.inf)
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e300)).exp() if skv else scores
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhqk,bhkd->bhqd", weights / torch.where(total == 0, 1.0, total), v)


def masks():
    generator = torch.Generator().manual_seed(1)
    keep = torch.rand(2, 4, 5, 7, generator=generator) < 0.5
    keep[0, :, 2] = False
    added = torch.randn(1, 4, 5, 7, generator=generator)
    return {
        "none": None,
        "bool": keep,
        "padding": torch.tensor([[True] * 7, [True] * 3 + [False] * 4])[:, None, None],
        "last axis": torch.arange(7) < 4,
        "one key for all": torch.ones(5, 1, dtype=torch.bool),
        "nothing": torch.zeros(5, 7, dtype=torch.bool),
        "added": added,
        "added with holes": added.masked_fill(~keep[:1], -math.inf),
        "added, far below": torch.full((5, 7), -1e30).masked_fill(keep[0, 0], 0.0),
    }


OPTIONS = [
    {},
    {"is_causal": True},
    {"is_causal": "top_left", "scale": -0.3},
    {"is_causal": "bottom_right"},
    {"window": 2},
    {"window": (1, 0), "is_causal": "bottom_right"},
    {"window": (-1, 1)},
    {"softcap": 0.7},
    {"softcap": 2.0, "is_causal": True, "scale": 0.5},
]


@pytest.mark.parametrize("mask", masks())
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_formula(mask, options):
    q, k, v = inputs()
    mask = masks()[mask]
    expected = by_hand(q, k, v, mask, **options)
    got = Int8Attention(precision="float")(q, k, v, mask=mask, **options)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for bits, bound in ((8, 0.04), (12, 0.004)):
        got = Int8Attention(bits)(q, k, v, mask=mask, **options)
        assert got.shape == expected.shape
        assert (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"softcap": 1.0}, {"window": 3}], ids=str)
def test_shared_heads_and_other_value_sizes(precision, options):
    q, k, v = inputs(h=6, hkv=2, dv=8)
    got = Int8Attention(12, precision)(q, k, v, enable_gqa=True, **options)
    expected = by_hand(q, k, v, **options)
    assert got.shape == (2, 6, 5, 8)
    assert (got - expected).norm() <= 0.004 * expected.norm()
    with pytest.raises(ValueError, match="enable_gqa=True"):
        Int8Attention(12, precision)(q, k, v, **options)


@pytest.mark.parametrize(("sq", "skv"), [(5, 0), (0, 5), (7, 5), (1, 9)])
@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("is_causal", [False, True, "bottom_right"])
def test_sizes(sq, skv, precision, is_causal):
    q, k, v = inputs(sq=sq, skv=skv)
    got = Int8Attention(12, precision)(q, k, v, is_causal=is_causal)
    expected = by_hand(q, k, v, is_causal=is_causal)
    assert got.shape == expected.shape
    assert (got - expected).norm() <= 0.004 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"window": 2}], ids=str)
def test_types_in_floating_point(dtype, options):
    q, k, v = inputs(dtype=dtype)
    mask = torch.full((5, 7), -1e30).masked_fill(torch.eye(5, 7) + torch.eye(5, 7).roll(2, 1) > 0, 0.5)
    got = Int8Attention(precision="float")(q, k, v, mask=mask, **options)
    assert got.dtype == dtype
    bound = 1e-6 if dtype == torch.float64 else 0.02
    expected = by_hand(q, k, v, mask, **options)  # float16 has no -1e30: its lowest number hides a key as well
    assert (got - expected).norm() <= bound * expected.norm()


def test_bits_and_precision_decide():
    q, k, v = inputs()
    attention = Int8Attention(8)
    assert torch.equal(attention(q, k, v), quantized_attention(q, k, v, bits=8))
    attention.bits = 12
    assert torch.equal(attention(q, k, v), quantized_attention(q, k, v, bits=12))
    attention.bits = "auto"
    assert torch.equal(attention(q, k, v), quantized_attention(q, k, v))
    attention.precision = "float"
    assert torch.equal(attention(q, k, v), torch.nn.functional.scaled_dot_product_attention(q, k, v))


def test_has_no_state():
    attention = Int8Attention(12)
    assert not attention.state_dict()
    assert not list(attention.parameters())
    assert repr(attention) == "Int8Attention(bits=12, precision=int8)"
    assert repr(Int8Attention(precision="float")) == "Int8Attention(precision=float)"
    assert copy.deepcopy(attention).bits == 12


def test_dropout():
    q, k, v = inputs()
    attention = Int8Attention()
    with pytest.raises(ValueError, match="dropout: got 0.5, expected 0 in training mode; .*eval"):
        attention(q, k, v, dropout=0.5)
    assert torch.equal(attention.eval()(q, k, v, dropout=0.5), attention(q, k, v))
    floating = Int8Attention(precision="float")
    for options in ({}, {"softcap": 5.0}, {"window": 9}):
        torch.manual_seed(0)
        kept = torch.stack([floating(q, k, v, dropout=0.5, **options) for _ in range(300)]).mean(0)
        plain = floating(q, k, v, **options)
        assert not torch.allclose(floating(q, k, v, dropout=0.5, **options), plain)
        assert (kept - plain).norm() < 0.2 * plain.norm()  # right on average
    assert torch.equal(floating.eval()(q, k, v, dropout=0.5), floating(q, k, v))


@pytest.mark.parametrize("options", [{}, {"softcap": 1.0}, {"mask": masks()["bool"]}], ids=lambda o: " ".join(o))
def test_gradients(options):
    q, k, v = (x.double().requires_grad_() for x in inputs())
    Int8Attention(precision="float")(q, k, v, **options).square().sum().backward()
    got = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    by_hand(q, k, v, **options).square().sum().backward()
    torch.testing.assert_close(got, [x.grad for x in (q, k, v)])


def test_backward_of_quantized_attention_raises():
    q, k, v = (x.requires_grad_() for x in inputs())
    with pytest.raises(RuntimeError, match="short_attention: backward: got a gradient, expected inference only"):
        Int8Attention()(q, k, v).sum().backward()


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("bits", ["auto", 8])
@pytest.mark.parametrize("options", [{}, {"is_causal": "bottom_right", "mask": masks()["padding"]}], ids=len)
def test_fullgraph(precision, bits, options):
    attention, (q, k, v) = Int8Attention(bits, precision), inputs()
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(q, k, v, **options), attention(q, k, v, **options), rtol=1e-6, atol=1e-6)


def test_hooks_see_the_arguments():
    seen = {}
    attention = Int8Attention(precision="float")
    attention.register_forward_hook(lambda m, args, kwargs, out: seen.update(kwargs, n=len(args)), with_kwargs=True)
    attention(*inputs(), is_causal=True)
    assert seen == {"n": 3, "is_causal": True}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"bits": 7}, r"Int8Attention: bits: got 7, expected 'auto' or one of \(8, 12\)"),
        ({"precision": "fp8"}, "Int8Attention: precision: got 'fp8'"),
    ],
)
def test_wrong_settings(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        Int8Attention(**arguments)


@pytest.mark.parametrize("precision", ["int8", "float"])
def test_wrong_arguments(precision):
    (q, k, v), attention = inputs(), Int8Attention(8, precision)
    for options, kind, problem in (
        ({"mask": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "mask: got torch.int64"),
        ({"mask": [[True]]}, TypeError, "mask: got list"),
        ({"mask": torch.ones(1, 1, 1, 5, 7) > 0}, ValueError, "mask: got"),
        ({"is_causal": "left"}, ValueError, "is_causal: got 'left'"),
        ({"window": 0}, ValueError, "window: got 0"),
        ({"softcap": -1.0}, ValueError, "softcap: got -1.0"),
        ({"scale": math.inf}, ValueError, "scale: got inf"),
    ):
        with pytest.raises(kind, match=problem):
            attention(q, k, v, **options)
