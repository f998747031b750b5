"""Attention with P and V in int8 too, in Triton's interpreter, against float64; the integers of V."""

from __future__ import annotations

import math

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.attention_tiles import attention_tile  # noqa: E402
from tcompress.kernels.triton.attention_values import quantize_values  # noqa: E402

import tcompress.ops  # noqa: E402, F401
from tcompress.ops.attention_numbers import quantize_tokens  # noqa: E402
from tcompress.ops.attention_reference import Visible  # noqa: E402

SMALL, ONES = attention_tile(32, 32, 4, 2), attention_tile(32, 32, 4, 2, ones=True)


def random(*shape, dtype=torch.float16, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(q, k, v, mask=None, bottom_right=False, left=-1, right=-1, softcap=0.0):
    """Output, logarithm of the denominator, and whether a query sees a key, in float64."""
    groups = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(groups, 1), v.double().repeat_interleave(groups, 1)
    s = q @ k.mT * q.shape[-1] ** -0.5
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    seen = Visible(bottom_right, left, right).block(q.shape[2], k.shape[2], torch.arange(k.shape[2])).expand(s.shape)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask > -math.inf)
        s = s if mask.dtype == torch.bool else s + mask.double()
    s = s.masked_fill(~seen, -math.inf)
    lse, some = torch.logsumexp(s, -1), seen.any(-1)
    return torch.exp(s - lse.masked_fill(~some, 0)[..., None]) @ v, lse, some


def relative(out, expected):
    return ((out.double() - expected).abs().sum() / expected.abs().sum()).item()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_accuracy_on_normal_inputs(d, causal):
    """Beside values in float16: both within the bars, 8 bits at most 1.8 times as far."""
    q, k, v = (random(1, 2, 256, d, seed=i) for i in range(3))
    expected, _, _ = exact(q, k, v, right=0 if causal else -1)
    errors = []
    for bits in (16, 8):
        out, _ = attention(q, k, v, causal=causal, value_bits=bits)
        errors.append(relative(out, expected))
        assert torch.nn.functional.cosine_similarity(out.double().flatten(), expected.flatten(), 0) >= 0.9998
    assert max(errors) <= 0.021
    assert errors[1] <= 1.8 * errors[0]


CASES = [  # Sq, Skv, D, Dv, H, Hkv, options
    (1, 1, 32, 16, 1, 1, {}),
    (5, 70, 40, 33, 4, 2, {"right": 0}),
    (70, 45, 32, 64, 2, 2, {"right": 0, "left": 9, "bottom_right": True}),
    (33, 65, 64, 17, 2, 1, {"softcap": 5.0}),
    (40, 97, 32, 32, 1, 1, {"left": 20, "right": 5}),
]


@pytest.mark.parametrize("tile", [SMALL, ONES], ids=["", "ones"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes_and_windows(case, tile):
    sq, skv, d, dv, h, kv_heads, options = case
    dtype = (torch.float16, torch.bfloat16, torch.float32)[CASES.index(case) % 3]
    q, k = random(1, h, sq, d, dtype=dtype), random(1, kv_heads, skv, d, dtype=dtype, seed=1) + 1
    v = random(1, skv, kv_heads, dv, dtype=dtype, seed=2).transpose(1, 2)
    out, lse = attention(q, k, v, return_lse=True, tile=tile, value_bits=8, **options)
    expected, expected_lse, some = exact(q, k, v, **options)
    assert out.dtype == dtype
    assert (out[~some] == 0).all()
    assert (lse[~some] == -math.inf).all()
    assert (lse - expected_lse)[some].abs().max() < 0.06
    assert (out - expected)[some].norm() <= 0.035 * expected[some].norm()


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(kind):
    q, k, v = (random(2, 2, 50, 32, seed=i) for i in range(3))
    mask = random(2, 1, 50, 50, dtype=torch.float32, seed=3)
    mask = mask > -0.5 if kind == "bool" else mask.masked_fill(mask < -1, -math.inf)
    mask[0, 0, 4] = False if kind == "bool" else -math.inf
    mask = mask.expand(2, 2, 50, 50)
    out, lse = attention(q, k, v, mask, causal=True, return_lse=True, tile=SMALL, value_bits=8)
    expected, _, some = exact(q, k, v, mask, right=0)
    assert not some.all()
    assert (out[~some] == 0).all()
    assert torch.equal(lse == -math.inf, ~some)
    assert (out - expected)[some].norm() <= 0.035 * expected[some].norm()
    if kind == "float":
        mask = mask.clone()
        mask[0, 1, 40, 3] = math.nan
        out, _ = attention(q, k, v, mask, causal=True, tile=SMALL, value_bits=8)
        assert out.isnan().any(-1).nonzero().tolist() == [[0, 1, 40]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_integers_of_values(dtype):
    """Those of `quantize_per_token` along the tokens."""
    v = random(2, 300, 3, 20, dtype=dtype).transpose(1, 2)
    v[0, 1, :, 4], v[1, 2, 7, 5], v[0, 0, 250, 6] = 0, math.nan, 1e4
    got, scale = quantize_values(v, 64)
    expected, expected_scale = quantize_tokens(v.float().mT, 8)
    assert got.shape == (6, 32, 320)
    assert torch.equal(got.view(2, 3, 32, 320)[:, :, :20, :300].float(), expected)
    assert torch.equal(scale.view(2, 3, 32)[:, :, :20].nan_to_num(-1), expected_scale.nan_to_num(-1))
    assert (got[:, :, 300:] == 0).all()
    assert (got[:, 20:] == 0).all()


@pytest.mark.parametrize("tile", [SMALL, ONES], ids=["", "ones"])
def test_what_is_not_finite(tile):
    q, k, v = (random(1, 1, 100, 32, dtype=torch.float32, seed=i) for i in range(3))
    q[0, 0, 7, 3] = math.nan
    out, _ = attention(q, k, v, causal=True, tile=tile, value_bits=8)
    assert out[0, 0].isnan().any(-1).nonzero().flatten().tolist() == [7]
    q[0, 0, 7, 3], k[0, 0, 70, 0] = 0, math.inf
    out, lse = attention(q, k, v, causal=True, return_lse=True, tile=tile, value_bits=8)
    assert out[0, 0, 70:].isnan().all()
    assert not out[0, 0, :64].isnan().any()
    assert lse[0, 0, 70:].isnan().all()
    k[0, 0, 70, 0], v[0, 0, 99, 5] = 0, math.inf
    out, _ = attention(q, k, v, causal=True, tile=tile, value_bits=8)
    assert out[0, 0, :, 5].isnan().all()
    assert out[0, 0].isnan().sum() == 100


def test_zeros_and_huge_values():
    zeros = torch.zeros(1, 1, 70, 32, dtype=torch.bfloat16)
    out, _ = attention(zeros, zeros, zeros, tile=ONES, value_bits=8)
    assert (out == 0).all()
    v = random(1, 1, 70, 32, dtype=torch.bfloat16) * 1e30
    out, _ = attention(zeros, zeros, v, tile=ONES, value_bits=8)
    torch.testing.assert_close(out.double(), v.double().mean(2, keepdim=True).expand_as(out), rtol=0.02, atol=2e28)


@pytest.mark.parametrize("at_start", [False, True])
def test_nothing_is_read_out_of_bounds(at_start):
    def run():
        q, k, v = (guarded(random(1, h, s, d), at_start) for h, s, d in ((2, 37, 40), (1, 45, 40), (1, 45, 24)))
        attention(q, k, v, causal=True, return_lse=True, tile=SMALL, value_bits=8)
        attention(q, k, v, left=9, right=2, tile=ONES, value_bits=8)

    assert outcome(run) == "ok"


def test_other_bits_are_refused():
    q = random(1, 1, 3, 32)
    with pytest.raises(ValueError, match="attention: value_bits: got 4 with bits=8, expected 16, or 8 with bits=8"):
        attention(q, q, q, value_bits=4)
