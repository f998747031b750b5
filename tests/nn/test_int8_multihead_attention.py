"""Int8MultiheadAttention against torch.nn.MultiheadAttention, called in all the ways that torch allows."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from tcompress.nn import Int8Attention, Int8MultiheadAttention, QuantizedLinear

L, S, N, E, H = 5, 7, 2, 24, 3


def theirs(dtype=torch.float32, **arguments):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(E, H, dtype=dtype, **{"batch_first": True, **arguments})
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)  # torch starts the biases at zero, which would hide a lost one
    return module.eval()


def inputs(batch_first=True, kdim=E, vdim=E, sq=L, skv=S, dtype=torch.float32):
    torch.manual_seed(1)
    shapes = [(N, sq, E), (N, skv, kdim), (N, skv, vdim)]
    return [torch.randn(s if batch_first else (s[1], s[0], s[2]), dtype=dtype) for s in shapes]


def keep(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0] = True  # every query keeps a key; empty rows have a test of their own
    return mask


def added(*shape):
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    return noise.masked_fill(~keep(*shape), -math.inf)


MASKS = {
    "none": {},
    "attn 2-D": {"attn_mask": ~keep(L, S)},
    "attn 3-D": {"attn_mask": ~keep(N * H, L, S)},
    "attn float": {"attn_mask": added(L, S)},
    "attn 3-D float": {"attn_mask": added(N * H, L, S)},
    "padding": {"key_padding_mask": ~keep(N, S)},
    "padding float": {"key_padding_mask": added(N, S)},
    "both": {"attn_mask": ~keep(L, S), "key_padding_mask": ~keep(N, S)},
    "both float": {"attn_mask": added(N * H, L, S), "key_padding_mask": added(N, S)},
    "causal": {"attn_mask": ~torch.ones(L, S, dtype=torch.bool).tril(), "is_causal": True},
    "causal and padding": {
        "attn_mask": ~torch.ones(L, S, dtype=torch.bool).tril(),
        "key_padding_mask": ~keep(N, S),
        "is_causal": True,
    },
}


def close(got, expected, bound):
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert (got - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"bias": False}, {"kdim": 8}, {"vdim": 6, "bias": False}], ids=str)
def test_like_torch(masks, batch_first, arguments):
    module, options = theirs(batch_first=batch_first, **arguments), MASKS[masks]
    q, k, v = inputs(batch_first, module.kdim, module.vdim)
    expected, none = module(q, k, v, need_weights=False, **options)
    assert none is None
    for precision, bits, bound in (("float", 8, 1e-6), ("int8", 12, 0.004), ("int8", 8, 0.04)):
        ours = Int8MultiheadAttention.from_torch(module, bits, precision)
        got, none = ours(q, k, v, need_weights=False, **options)
        close(got, expected, bound)
        assert none is None


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("average", [True, False])
def test_weights(masks, batch_first, average):
    module = theirs(batch_first=batch_first)
    ours = Int8MultiheadAttention.from_torch(module)
    q, k, v = inputs(batch_first)
    options = {"average_attn_weights": average, **MASKS[masks]}
    expected, weights = module(q, k, v, **options)
    got, ours_weights = ours(q, k, v, **options)
    close(got, expected, 1e-6)
    close(ours_weights, weights, 1e-6)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"attn_mask": ~keep(H, L, S), "key_padding_mask": ~keep(S)}], ids=len)
def test_without_batch(batch_first, need_weights, options):
    module = theirs(batch_first=batch_first)
    ours = Int8MultiheadAttention.from_torch(module, precision="float")
    q, k, v = (x[0] for x in inputs())
    expected, weights = module(q, k, v, need_weights=need_weights, **options)
    got, ours_weights = ours(q, k, v, need_weights=need_weights, **options)
    close(got, expected, 1e-6)
    if need_weights:
        close(ours_weights, weights, 1e-6)


def test_query_without_keys():
    """Its row is the bias of out_proj, whether the weights are asked for or not; torch gives NaN for one of the two."""
    ours = Int8MultiheadAttention.from_torch(theirs(), precision="float")
    blocked = ~keep(L, S)
    blocked[2] = True
    for need_weights in (False, True):
        y, weights = ours(*inputs(), attn_mask=blocked, need_weights=need_weights)
        assert torch.equal(y[:, 2], ours.out_proj.bias.expand(N, E))
        assert y.isfinite().all()
    assert not weights[:, 2].any()


def test_quantized_projections():
    module = theirs()
    ours = Int8MultiheadAttention.from_torch(module, 8)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(ours, name, QuantizedLinear.from_linear(getattr(ours, name)))
    q, k, v = inputs()
    close(ours(q, k, v, need_weights=False)[0], module(q, k, v, need_weights=False)[0], 0.05)


def test_from_torch_copies_unless_told_not_to():
    module = theirs()
    ours = Int8MultiheadAttention.from_torch(module)
    views = Int8MultiheadAttention.from_torch(module, copy=False)
    before = copy.deepcopy(ours.state_dict())
    nn.init.zeros_(module.in_proj_weight)
    assert all(torch.equal(ours.state_dict()[k], before[k]) for k in before)
    assert not views.k_proj.weight.any()
    assert all(p.requires_grad for p in ours.parameters())
    assert not ours.training
    assert Int8MultiheadAttention.from_torch(module.train()).training
    assert [n for n, _ in ours.named_children()] == ["q_proj", "k_proj", "v_proj", "out_proj", "attention"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_in_torch_s_layers(norm_first, masked):
    """In evaluation mode torch would hand the weights to its native function, were these not as they are."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(E, 4, 32, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    decoder = nn.TransformerDecoderLayer(E, 4, 32, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(N, L, E)
    causal = nn.Transformer.generate_square_subsequent_mask(L) if masked else None
    padding = torch.tensor([[False] * L, [False] * 3 + [True] * 2]) if masked else None

    def run():
        memory = encoder(x, mask=causal, src_key_padding_mask=padding, is_causal=masked)
        return decoder(x, memory, tgt_mask=causal, memory_key_padding_mask=padding, tgt_is_causal=masked)

    with torch.inference_mode():
        expected = run()
        calls = []
        for parent in (*encoder.layers, decoder):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.MultiheadAttention):
                    ours = Int8MultiheadAttention.from_torch(child, 12)
                    ours.attention.register_forward_hook(lambda m, args, out: calls.append(m))
                    setattr(parent, name, ours)
        close(run(), expected, 0.004)
    assert len(calls) == 4


def test_dropout():
    module = theirs(dropout=0.5).train()
    q, k, v = inputs()
    ours = Int8MultiheadAttention.from_torch(module)
    with pytest.raises(ValueError, match="dropout: got 0.5, expected 0 in training mode"):
        ours(q, k, v, need_weights=False)
    ours.attention.precision = "float"
    torch.manual_seed(0)
    assert not torch.equal(ours(q, k, v, need_weights=False)[0], ours(q, k, v, need_weights=False)[0])
    _, weights = ours(q, k, v)
    assert (weights == 0).any()
    expected = module.eval()(q, k, v, need_weights=False)[0]
    close(ours.eval()(q, k, v, need_weights=False)[0], expected, 1e-6)


def test_gradients():
    module = theirs()
    ours = Int8MultiheadAttention.from_torch(module, precision="float")
    module(*inputs(), need_weights=False)[0].square().sum().backward()
    ours(*inputs(), need_weights=False)[0].square().sum().backward()
    got = torch.cat([ours.q_proj.weight.grad, ours.k_proj.weight.grad, ours.v_proj.weight.grad])
    torch.testing.assert_close(got, module.in_proj_weight.grad, rtol=1e-4, atol=1e-5)
    ours.attention.precision = "int8"
    with pytest.raises(RuntimeError, match="backward: got a gradient, expected inference only"):
        ours(*inputs(), need_weights=False)[0].sum().backward()


@pytest.mark.parametrize("precision", ["int8", "float"])
@pytest.mark.parametrize("options", [MASKS["none"], MASKS["both"], {"need_weights": True}], ids=len)
def test_fullgraph(precision, options):
    ours = Int8MultiheadAttention.from_torch(theirs(), 8, precision)
    options = {"need_weights": False, **options}
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        close(compiled(*inputs(), **options)[0], ours(*inputs(), **options)[0], 1e-5)


def test_half_precision():
    module = theirs().bfloat16()
    q, k, v = (x.bfloat16() for x in inputs())
    expected = module(q, k, v, need_weights=False)[0]
    close(Int8MultiheadAttention.from_torch(module)(q, k, v, need_weights=False)[0], expected, 0.04)


@pytest.mark.parametrize(
    ("arguments", "problem"), [({"add_bias_kv": True}, "add_bias_kv"), ({"add_zero_attn": True}, "add_zero_attn")]
)
def test_what_cannot_be_converted(arguments, problem):
    with pytest.raises(ValueError, match=problem):
        Int8MultiheadAttention.from_torch(theirs(**arguments))


def test_another_class_is_not_converted():
    class Other(nn.MultiheadAttention):
        pass

    with pytest.raises(TypeError, match="got Other, expected torch.nn.MultiheadAttention itself"):
        Int8MultiheadAttention.from_torch(Other(E, H))
    odd = theirs()
    odd.out_proj = nn.Identity()
    with pytest.raises(ValueError, match="its out_proj is Identity"):
        Int8MultiheadAttention.from_torch(odd)


def test_wrong_arguments():
    ours = Int8MultiheadAttention(E, H, batch_first=True).eval()
    assert isinstance(ours.attention, Int8Attention)
    q, k, v = inputs()
    nested = torch.nested.nested_tensor([q[0], q[1]])
    for arguments, options, kind, problem in (
        ((q, k, v[:, 1:]), {}, ValueError, r"query, key, value: got .*, expected \[N, L, 24\]"),
        ((q, k[:1], v[:1]), {}, ValueError, "query, key, value"),
        ((q[0], k, v), {}, ValueError, "query, key, value"),
        ((q[..., 1:], k, v), {}, ValueError, r"expected \[N, L, 24\], \[N, S, 24\], \[N, S, 24\], or without N"),
        ((nested, k, v), {}, ValueError, "a nested tensor"),
        ((q, k, v), {"is_causal": True}, ValueError, "is_causal: got True without attn_mask"),
        ((q, k, v), {"attn_mask": torch.zeros(L, S, dtype=torch.int64)}, TypeError, "attn_mask: got torch.int64"),
        ((q, k, v), {"attn_mask": ~keep(S, L)}, ValueError, r"attn_mask: got \[7, 5\], expected \[L, S\] = \[5, 7\]"),
        ((q, k, v), {"key_padding_mask": ~keep(S)}, ValueError, r"key_padding_mask: got \[7\], expected \[N, S\]"),
    ):
        with pytest.raises(kind, match=problem):
            ours(*arguments, **options)
    with pytest.raises(ValueError, match="embed_dim: got 25, expected a multiple of num_heads = 3"):
        Int8MultiheadAttention(25, 3)
