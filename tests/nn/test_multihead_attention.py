import math

import pytest
import torch
from torch import nn

from tcompress.nn.multihead_attention import MultiHeadAttention


def attention_float64(module, q, k, v, allowed=None):
    """The formula of the class by einsum; ``allowed`` is a full ``[B, H, Sq, Skv]``."""
    weights = {name: p.detach().double() for name, p in module.named_parameters()}

    def heads(name, x):
        y = torch.einsum("bsk,nk->bsn", x.double(), weights[f"{name}.weight"]) + weights.get(f"{name}.bias", 0)
        return y.reshape(*x.shape[:2], module.n_head, module.d_head)

    scores = torch.einsum("bqhd,bkhd->bhqk", heads("q_proj", q), heads("k_proj", k)) / math.sqrt(module.d_head)
    weight = scores.exp() if allowed is None else scores.exp() * allowed
    total = weight.sum(-1, keepdim=True)
    probability = weight / torch.where(total == 0, 1.0, total)
    attended = torch.einsum("bhqk,bkhd->bqhd", probability, heads("v_proj", v)).flatten(2)
    return torch.einsum("bsk,nk->bsn", attended, weights["o_proj.weight"]) + weights.get("o_proj.bias", 0)


def make(n_head=3, d_model=10, d_head=4, **arguments):
    torch.manual_seed(0)
    return MultiHeadAttention(n_head, d_model, d_head, **arguments)


def inputs(batch=2, sq=5, skv=7, d_model=10, dtype=torch.float32):
    torch.manual_seed(1)
    sizes = ((batch, sq, d_model), (batch, skv, d_model), (batch, skv, d_model))
    return tuple(torch.randn(size, dtype=dtype) for size in sizes)


@pytest.mark.parametrize(("n_head", "d_model", "d_head"), [(3, 10, 4), (1, 10, 10), (2, 10, 5), (5, 10, 1), (2, 1, 3)])
@pytest.mark.parametrize(("sq", "skv"), [(5, 7), (7, 5), (1, 1), (1, 9), (0, 3)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
def test_formula(n_head, d_model, d_head, sq, skv, dtype, tolerance):
    module = make(n_head, d_model, d_head, dtype=dtype)
    q, k, v = inputs(2, sq, skv, d_model, dtype)
    y = module(q, k, v)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), attention_float64(module, q, k, v), rtol=tolerance, atol=tolerance)


def test_without_bias():
    module = make(bias=False)
    q, k, v = inputs()
    assert [name for name, _ in module.named_parameters()] == [f"{n}_proj.weight" for n in "qkvo"]
    torch.testing.assert_close(module(q, k, v).double(), attention_float64(module, q, k, v), rtol=1e-5, atol=1e-5)


def test_projection_shapes():
    module = make(n_head=3, d_model=10, d_head=4)
    assert module.q_proj.weight.shape == module.k_proj.weight.shape == module.v_proj.weight.shape == (12, 10)
    assert module.o_proj.weight.shape == (10, 12)


def random_mask(*shape):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    mask[..., 0] = True  # every query keeps a key; empty rows have their own tests
    return mask


MASKS = {
    "key padding [B,1,1,Skv]": (random_mask(2, 1, 1, 7), lambda m: m),
    "causal [Sq,Skv]": (torch.ones(5, 7, dtype=torch.bool).tril(), lambda m: m),
    "full [B,H,Sq,Skv]": (random_mask(2, 3, 5, 7), lambda m: m),
    "per head [1,H,1,Skv]": (random_mask(1, 3, 1, 7), lambda m: m),
    "3-D gets a head axis [B,Sq,Skv]": (random_mask(2, 5, 7), lambda m: m[:, None]),
    "3-D key padding [B,1,Skv]": (random_mask(2, 1, 7), lambda m: m[:, None]),
    "1-D [Skv]": (random_mask(7), lambda m: m),
    "last axis 1 [Sq,1]": (torch.ones(5, 1, dtype=torch.bool), lambda m: m),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
def test_mask(name, mask_dtype):
    mask, to_4d = MASKS[name]
    module = make()
    q, k, v = inputs()
    expected = attention_float64(module, q, k, v, to_4d(mask).expand(2, 3, 5, 7))
    y = module(q, k, v, mask.to(mask_dtype))
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_mask_3d_is_per_sequence_even_where_it_could_be_per_head():
    """B == n_head: the first axis must be read as the batch."""
    module = make()
    q, k, v = inputs(batch=3)
    mask = random_mask(3, 5, 7)
    expected = attention_float64(module, q, k, v, mask[:, None].expand(3, 3, 5, 7))
    torch.testing.assert_close(module(q, k, v, mask).double(), expected, rtol=1e-5, atol=1e-5)


def test_blocked_keys_have_no_influence():
    module = make()
    q, k, v = inputs()
    mask = torch.ones(7, dtype=torch.bool)
    mask[4:] = False
    torch.testing.assert_close(module(q, k, v, mask), module(q, k[:, :4], v[:, :4]))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("requires_grad", [False, True])  # torch picks another kernel for each
def test_fully_masked_rows_attend_to_nothing(dtype, tolerance, requires_grad):
    module = make(dtype=dtype)
    q, k, v = (x.requires_grad_(requires_grad) for x in inputs(dtype=dtype))
    mask = random_mask(2, 3, 5, 7)
    mask[0, :, 2] = False  # one query, all heads
    mask[1, 1, 3] = False  # one query, one head
    with torch.set_grad_enabled(requires_grad):
        y = module(q, k, v, mask)
    assert torch.equal(y[0, 2], module.o_proj.bias)
    torch.testing.assert_close(y.double(), attention_float64(module, q, k, v, mask), rtol=tolerance, atol=tolerance)
    if requires_grad:
        y.sum().backward()
        assert all(x.grad.isfinite().all() for x in (q, k, v, *module.parameters()))
        assert torch.equal(q.grad[0, 2], torch.zeros_like(q.grad[0, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_everything_masked(dtype):
    module = make(dtype=dtype)
    y = module(*inputs(dtype=dtype), torch.zeros(5, 7, dtype=torch.bool))
    assert torch.equal(y, module.o_proj.bias.expand(2, 5, 10))


@pytest.mark.parametrize("mask", [None, torch.ones(3, 0, dtype=torch.bool)])
def test_no_key_at_all(mask):
    module = make()
    y = module(*inputs(sq=3, skv=0), mask)
    assert torch.equal(y, module.o_proj.bias.expand(2, 3, 10))


def test_nan_spreads_to_its_own_sequence_only():
    module = make()
    q, k, v = inputs()
    v[0, 3, 0] = float("nan")
    y = module(q, k, v)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


def test_nan_does_not_reach_a_query_that_attends_to_nothing():
    module = make()
    q, k, v = inputs()
    k[0, 3], v[0, 4] = float("nan"), float("nan")
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[2] = False
    y = module(q, k, v, mask)
    assert torch.equal(y[:, 2], module.o_proj.bias.expand(2, 10))
    assert y[0, [0, 1, 3, 4]].isnan().all()


def test_non_contiguous_and_expanded_inputs():
    module = make()
    q, k, v = inputs()
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    torch.testing.assert_close(module(*strided), module(q, k, v))
    same = q[:1].expand(3, 5, 10)
    torch.testing.assert_close(module(same, same, same), module(q[:1], q[:1], q[:1]).expand(3, 5, 10))


def test_projections_can_be_swapped():
    """They are called as modules, never read by weight: quantized ones take their place."""
    module = make(n_head=2, d_model=8, d_head=4)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        setattr(module, name, nn.Identity())
    x = torch.randn(1, 3, 8)
    only_second = torch.tensor([False, True, False])
    assert torch.equal(module(x, x, x, only_second), x[:, 1:2].expand(1, 3, 8))


@pytest.mark.parametrize("masked", [False, True])
def test_fullgraph(masked):
    """`eager` backend: traces the whole forward as one graph, without the cost of a code generator."""
    module = make()
    arguments = (*inputs(), random_mask(2, 5, 7) if masked else None)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(*arguments), module(*arguments))


@pytest.mark.parametrize("name", ["n_head", "d_model", "d_head"])
def test_rejects_bad_sizes(name):
    with pytest.raises(ValueError, match=f"MultiHeadAttention: {name}: got 0, expected at least 1"):
        MultiHeadAttention(**{"n_head": 2, "d_model": 8, "d_head": 4, name: 0})


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (((5, 10), (2, 7, 10), (2, 7, 10)), r"q: got shape \(5, 10\), expected \[B, S, 10\]"),
        (((2, 5, 10), (2, 7, 9), (2, 7, 10)), r"k: got shape \(2, 7, 9\), expected \[B, S, 10\]"),
        (((2, 5, 10), (3, 7, 10), (3, 7, 10)), "k: got batch 3, expected 2"),
        (((2, 5, 10), (2, 7, 10), (2, 6, 10)), r"v: got shape \(2, 6, 10\), expected \(2, 7, 10\)"),
    ],
)
def test_rejects_bad_shapes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make()(*(torch.zeros(size) for size in sizes))


def test_rejects_bad_kinds():
    q, k, v = inputs()
    with pytest.raises(TypeError, match=r"k: got torch.int64, expected a floating tensor"):
        make()(q, k.long(), v)
    with pytest.raises(TypeError, match="v: got list"):
        make()(q, k, [v])
    with pytest.raises(TypeError, match="mask: got list"):
        make()(q, k, v, [[True]])
    with pytest.raises(TypeError, match=r"mask: got torch\.complex64"):
        make()(q, k, v, torch.ones(5, 7, dtype=torch.complex64))


@pytest.mark.parametrize("shape", [(7, 5), (2, 7), (3, 5, 7), (2, 2, 5, 7), (1, 2, 3, 5, 7), (1, 1, 1, 1, 1)])
def test_rejects_a_mask_that_does_not_broadcast(shape):
    with pytest.raises(ValueError, match=r"mask: got shape .* \[B, n_head, Sq, Skv\] = \[2, 3, 5, 7\]"):
        make()(*inputs(), torch.ones(shape, dtype=torch.bool))


def test_rejects_an_additive_mask():
    additive = torch.zeros(5, 7).masked_fill(~random_mask(5, 7), float("-inf"))
    with pytest.raises(ValueError, match="mask: got a floating mask with other values, expected only 0"):
        make()(*inputs(), additive)
    module = make()
    assert torch.equal(module(*inputs(), additive == 0), module(*inputs(), random_mask(5, 7)))


def torch_attention(dtype=torch.float32, batch_first=True, **arguments):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(12, 3, batch_first=batch_first, dtype=dtype, **arguments)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)  # torch starts the biases at zero, which would hide a lost one
    return theirs.eval()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_from_torch(bias, dtype, tolerance):
    theirs = torch_attention(dtype, bias=bias)
    ours = MultiHeadAttention.from_torch(theirs)
    q, k, v = inputs(d_model=12, dtype=dtype)
    allowed, keys = random_mask(5, 7), random_mask(2, 7)
    for arguments, mask in [
        ({}, None),
        ({"attn_mask": ~allowed}, allowed),
        ({"key_padding_mask": ~keys}, keys[:, None, None]),
        ({"attn_mask": ~allowed, "key_padding_mask": ~keys}, allowed & keys[:, None, None]),
    ]:
        expected, _ = theirs(q, k, v, need_weights=False, **arguments)
        torch.testing.assert_close(ours(q, k, v, mask), expected, rtol=tolerance, atol=tolerance)


def test_from_torch_is_batch_first_whatever_the_original_is():
    theirs = torch_attention(batch_first=False)
    q, k, v = inputs(d_model=12)
    expected, _ = theirs(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
    ours = MultiHeadAttention.from_torch(theirs)
    torch.testing.assert_close(ours(q, k, v), expected.transpose(0, 1), rtol=1e-5, atol=1e-5)


def test_from_torch_with_separate_weights():
    packed = torch_attention()
    separate = torch_attention()
    for name, weight in zip("qkv", packed.in_proj_weight.chunk(3), strict=True):
        setattr(separate, f"{name}_proj_weight", nn.Parameter(weight.detach().clone()))
    separate.in_proj_weight = None
    q, k, v = inputs(d_model=12)
    ours, expected = MultiHeadAttention.from_torch(separate), MultiHeadAttention.from_torch(packed)
    assert torch.equal(ours(q, k, v), expected(q, k, v))


def test_from_torch_copies_and_keeps_the_mode():
    theirs = torch_attention()
    ours = MultiHeadAttention.from_torch(theirs)
    before = {name: p.detach().clone() for name, p in ours.named_parameters()}
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in ours.named_parameters())
    assert not ours.training
    assert MultiHeadAttention.from_torch(theirs.train()).training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"add_bias_kv": True}, "add_bias_kv"),
        ({"add_zero_attn": True}, "add_zero_attn"),
        ({"kdim": 8}, "kdim: got 8, expected embed_dim=12"),
        ({"vdim": 8}, "vdim: got 8, expected embed_dim=12"),
    ],
)
def test_from_torch_refuses_what_it_cannot_copy(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention.from_torch(torch_attention(**arguments))


def test_from_torch_refuses_dropout_in_training():
    theirs = torch_attention(dropout=0.1)
    MultiHeadAttention.from_torch(theirs)
    with pytest.raises(ValueError, match=r"dropout: got 0.1, .* call .eval\(\) first"):
        MultiHeadAttention.from_torch(theirs.train())


def test_from_torch_refuses_another_class():
    class Other(nn.MultiheadAttention):
        pass

    swapped = torch_attention()
    swapped.out_proj = nn.Identity()
    with pytest.raises(TypeError, match="out_proj: got Identity"):
        MultiHeadAttention.from_torch(swapped)
    for module in (Other(12, 3), nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=f"got {type(module).__name__}, expected torch.nn.MultiheadAttention"):
            MultiHeadAttention.from_torch(module)
