"""Attention with Q and K in 12 bits, two bytes each, in Triton's interpreter: against float64, and the integers of the
op and their exact sums."""

from __future__ import annotations

import math

import pytest
import torch
import triton_cases

triton_cases.require()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton import attention_prepare  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.attention_tiles import attention_tile  # noqa: E402
from tcompress.kernels.triton.numbers import dot_12_bits, split_12_bits  # noqa: E402

from tcompress import explain, ops, use_backend  # noqa: E402
from tcompress.ops.attention_numbers import quantize_tokens  # noqa: E402
from tcompress.ops.attention_reference import Visible  # noqa: E402

SMALL, ONES = attention_tile(32, 32, 4, 2), attention_tile(32, 32, 4, 2, ones=True)


def random(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(q, k, v, mask=None, bottom_right=False, left=-1, right=-1, softcap=0.0, scale=None):
    """Output, logarithm of the denominator, and whether a query sees a key, in float64."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    s = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    seen = Visible(bottom_right, left, right).block(q.shape[2], k.shape[2], torch.arange(k.shape[2])).expand(s.shape)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > -math.inf)
        s = s if mask.dtype == torch.bool else s + mask.double()
    s = s.masked_fill(~seen, -math.inf)
    lse, some = torch.logsumexp(s, -1), seen.any(-1)
    return torch.exp(s - lse.masked_fill(~some, 0)[..., None]) @ v, lse, some


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("tokens", [256, 512])
def test_accuracy_on_normal_inputs(tokens, d, causal):
    """The bars of SageAttention's paper, also where 8 bits are too few: 1.1e-3 to 2e-3 for 256 tokens."""
    q, k, v = (random(1, 2, tokens, d, seed=i) for i in range(3))
    with use_backend("triton"):
        out = ops.quantized_attention(q, k, v, bits=12, is_causal=causal)
    expected, _, _ = exact(q, k, v, right=0 if causal else -1)
    error = out.double() - expected
    assert error.square().mean().sqrt() <= 7.3e-4 / 4
    assert torch.nn.functional.cosine_similarity(out.double().flatten(), expected.flatten(), 0) >= 0.999999
    assert error.abs().sum() <= 0.0015 * expected.abs().sum()


CASES = [  # Sq, Skv, D, Dv, H, Hkv, options
    (1, 1, 32, 16, 1, 1, {}),
    (5, 70, 40, 33, 4, 2, {"right": 0}),
    (70, 45, 32, 64, 2, 2, {"right": 0, "left": 9, "bottom_right": True}),
    (33, 65, 64, 17, 2, 1, {"softcap": 5.0}),
    (40, 97, 32, 32, 1, 1, {"left": 20, "right": 5}),
    (13, 66, 200, 256, 2, 2, {"scale": -0.1}),
]
#: Of the output, relative, and of the logarithm; in 8 bits 0.021 and 0.06. P and V of float32 are rounded to bfloat16.
FAR = {torch.float16: 0.003, torch.bfloat16: 0.006, torch.float32: 0.006}


@pytest.mark.parametrize("tile", [SMALL, ONES, None], ids=["", "ones", "default"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_and_windows(case, tile):
    sq, skv, d, dv, h, kv_heads, options = case
    dtype = (torch.float16, torch.bfloat16, torch.float32)[CASES.index(case) % 3]
    q, k = random(1, h, sq, d, dtype=dtype), random(1, kv_heads, skv, d, dtype=dtype, seed=1) + 1
    v = random(1, skv, kv_heads, dv, dtype=dtype, seed=2).transpose(1, 2)
    out, lse = attention(q, k, v, return_lse=True, tile=tile, bits=12, **options)
    expected, expected_lse, some = exact(q, k, v, **options)
    assert out.dtype == dtype
    assert (out[~some] == 0).all()
    assert (lse[~some] == -math.inf).all()
    assert (lse - expected_lse)[some].abs().max() < 0.006
    assert (out - expected)[some].norm() <= FAR[dtype] * expected[some].norm()


@pytest.mark.parametrize("d", [32, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(kind, d):
    q, k, v = (random(2, 2, 50, d, seed=i) for i in range(3))
    mask = random(2, 1, 50, 50, dtype=torch.float32, seed=3)
    mask = mask > -0.5 if kind == "bool" else mask.masked_fill(mask < -1, -math.inf)
    mask[0, 0, 4] = False if kind == "bool" else -math.inf
    mask = mask.expand(2, 2, 50, 50)
    out, lse = attention(q, k, v, mask, causal=True, return_lse=True, bits=12)
    expected, _, some = exact(q, k, v, mask, right=0)
    assert not some.all()
    assert (out[~some] == 0).all()
    assert torch.equal(lse == -math.inf, ~some)
    assert (out - expected)[some].norm() <= FAR[q.dtype] * expected[some].norm()


def test_integers_are_those_of_the_op():
    """Of queries bit for bit; of keys with a scale for a block of them."""
    q, k = random(1, 2, 70, 48, dtype=torch.float32), random(1, 2, 70, 48, dtype=torch.float32, seed=1) + 5
    q[0, 0, 3], q[0, 1, 4, 5] = 0, math.nan
    got = attention_prepare.quantize(q, k, math.log(2), 64, 64, False, bits=12)
    assert got.q.shape == (2, 128, 128)
    high, low = got.q[..., :64].int(), got.q[..., 64:].int()
    assert high.abs().max() == 64
    assert low.min() == -16
    assert low.max() == 15
    integers, scale = quantize_tokens(q, 12)
    whole = (32 * high + low).view(1, 2, 128, 64)
    assert torch.equal(whole[:, :, :70, :48].float(), integers)
    assert (whole[:, :, :, 48:] == 0).all()
    torch.testing.assert_close(got.q_scale.view(1, 2, 128)[:, :, :70], scale, rtol=3e-7, atol=0, equal_nan=True)
    keys = (32 * got.k[..., :64].int() + got.k[..., 64:]).view(2, 2, 64, 64)
    assert keys.abs().amax((2, 3)).tolist() == [[2047, 2047], [2047, 2047]]
    back = (keys * got.k_scale[..., None, None]).view(2, 128, 64)
    smoothed = (k - k.mean(2, keepdim=True))[0]
    assert ((back[:, :70, :48] - smoothed).abs() <= got.k_scale.max() * 0.502).all()
    assert (back[:, 70:] == 0).all()


@triton.jit
def product(A, B, OUT, N: tl.constexpr, K: tl.constexpr):
    at = tl.arange(0, N)[:, None] * K + tl.arange(0, K)[None, :]
    a, a_low = split_12_bits(tl.load(A + at))
    b, b_low = split_12_bits(tl.load(B + at))
    x = dot_12_bits(a, a_low, tl.trans(b), tl.trans(b_low))
    tl.store(OUT + tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :], x)


def test_sums_of_products_are_exact():
    """Up to the largest there are: 2047² · 256."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-2047, 2048, (32, 256), dtype=torch.int32, generator=generator) for _ in range(2))
    a[0], b[0], a[1], a[2, ::2], b[2, ::2] = 2047, 2047, -2047, -2047, 2047
    out = torch.empty(32, 32, dtype=torch.int32)
    product[(1,)](a, b, out, N=32, K=256)
    assert torch.equal(out.double(), a.double() @ b.double().mT)
    assert out[0, 0] == 2047**2 * 256


def test_what_is_not_finite():
    q, k, v = (random(1, 1, 100, 32, dtype=torch.float32, seed=i) for i in range(3))
    q[0, 0, 7, 3] = math.nan
    out, _ = attention(q, k, v, causal=True, tile=SMALL, bits=12)
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [7]
    q[0, 0, 7, 3], k[0, 0, 70, 0] = 0, math.inf
    out, lse = attention(q, k, v, causal=True, return_lse=True, tile=SMALL, bits=12)
    assert out[0, 0, 70:].isnan().all()
    assert not out[0, 0, :64].isnan().any()
    assert lse[0, 0, 70:].isnan().all()


def test_zeros():
    zeros, v = torch.zeros(1, 1, 70, 32, dtype=torch.float16), random(1, 1, 70, 32)
    out, _ = attention(zeros, zeros, v, tile=ONES, bits=12)
    torch.testing.assert_close(out.double(), v.double().mean(2, keepdim=True).expand_as(out), rtol=0, atol=1e-3)


@pytest.mark.parametrize("at_start", [False, True])
def test_nothing_is_read_out_of_bounds(at_start):
    def run():
        q, k, v = (guarded(random(1, h, s, d), at_start) for h, s, d in ((2, 37, 40), (1, 45, 40), (1, 45, 24)))
        attention(q, k, v, causal=True, return_lse=True, tile=SMALL, bits=12)

    assert outcome(run) == "ok"


def test_other_bits_are_refused():
    q = random(1, 1, 3, 32)
    with pytest.raises(ValueError, match="attention: bits: got 10, expected 8 or 12"):
        attention(q, q, q, bits=10)
    with pytest.raises(ValueError, match="attention: value_bits: got 8 with bits=12"):
        attention(q, q, q, bits=12, value_bits=8)


def test_the_op_chooses_it():
    q = random(1, 2, 9, 32)
    with use_backend("triton"):
        assert explain(ops.quantized_attention, q, q, q, bits=12).backend == "triton"
        out, lse = ops.quantized_attention(q, q, q, bits=12, return_lse=True)
    expected = attention(q, q, q, return_lse=True, bits=12)
    assert torch.equal(out, expected[0])
    assert torch.equal(lse, expected[1])
