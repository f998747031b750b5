"""Norms and rotary embedding fused with the quantizer, in Triton's interpreter: integers bit for bit."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton import quantize_norm as norm  # noqa: E402
from tcompress.kernels.triton import quantize_rotary as rotary  # noqa: E402

import tcompress.ops  # noqa: E402, F401
from tcompress.ops.attention_numbers import quantize_tokens  # noqa: E402

per_token = sys.modules["tcompress.ops.quantize_per_token"]
EPSILON = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact_norm(x, weight, bias, eps, centre):
    x = x.double()
    x = x - x.mean(1, keepdim=True) if centre else x
    y = x / (x.square().mean(1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, slow(torch.float16)])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (7, False)])
@pytest.mark.parametrize("shape", [(1, 1), (3, 17), (5, 64), (4, 300), (2, 9001), (0, 8)])
def test_norms(shape, bits, symmetric, centre, dtype):
    x, residual = random(*shape, dtype=dtype) * 3 + 1, random(*shape, dtype=dtype, seed=1)
    weight, bias = random(shape[1], seed=2), random(shape[1], seed=3) if centre else None
    got = norm.quantize_norm(x, weight, bias, 1e-5, centre, residual, bits, symmetric, True)
    assert torch.equal(got.total, x + residual)
    expected = exact_norm(x + residual, weight, bias, 1e-5, centre)
    if shape[0]:
        # the largest value, since centring cancels
        assert (got.normed.double() - expected).abs().max() <= EPSILON[dtype] * (1 + 3 * expected.abs().max())
    q, scale, zero = per_token.reference(got.normed, bits, symmetric)
    assert torch.equal(got.q[:, : shape[1]].int(), q.int())
    assert (got.q[:, shape[1] :] == 0).all()
    assert torch.equal(got.scale, scale[:, 0])
    assert torch.equal(got.zero_point, zero[:, 0])
    plain = norm.quantize_norm(x + residual, weight, bias, 1e-5, centre, None, bits, symmetric)
    assert plain.total is None
    assert plain.normed is None
    assert torch.equal(plain.q, got.q)


def test_norms_without_weight_of_strided_and_odd_rows():
    x = random(40, 6).t()[:, ::2]
    x[1], x[2, 3], x[3, 0] = 0, math.nan, math.inf
    for centre in (False, True):
        got = norm.quantize_norm(x, centre=centre, return_normed=True)
        expected = exact_norm(x, None, None, 1e-5, centre)
        fine = [0, 1, 4, 5]
        torch.testing.assert_close(got.normed[fine].double(), expected[fine], rtol=1e-6, atol=1e-6)
        assert (got.q[1:4] == 0).all()
        assert torch.equal(got.scale.isnan(), torch.tensor([False, False, True, True, False, False]))


def turn(x, cos, sin, interleaved):
    """In float32, products and sums rounded one by one, then to the type of x."""
    rotated = 2 * cos.shape[-1]
    y, head = x.float().clone(), x[..., :rotated].float()
    first, second = (head[..., ::2], head[..., 1::2]) if interleaved else head.chunk(2, -1)
    turned = first * cos.float() - second * sin.float(), second * cos.float() + first * sin.float()
    y[..., :rotated] = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return y.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 2, 2), (2, 3, 5, 64, 64), (1, 2, 17, 80, 20), (1, 2, 3, 33, 32), (1, 1, 2, 8, 0)]
)
def test_rotary(shape, interleaved, dtype):
    b, h, s, d, rotated = shape
    x = random(b, s, h, d, dtype=dtype).transpose(1, 2)
    angle = torch.arange(100)[:, None] * torch.rand(rotated // 2)
    cos, sin = angle.cos(), angle.sin()
    q, scale = rotary.quantize_rotary(x, cos, sin, first=7, interleaved=interleaved)
    expected, expected_scale = quantize_tokens(turn(x, cos[7 : 7 + s], sin[7 : 7 + s], interleaved).float(), 8)
    assert torch.equal(q[..., :d].float(), expected)
    assert (q[..., d:] == 0).all()
    assert torch.equal(scale, expected_scale)
    positions = torch.randint(0, 100, (b, s))
    q, scale = rotary.quantize_rotary(x, cos, sin, positions, interleaved=interleaved, bits=5)
    turned = turn(x, cos[positions][:, None], sin[positions][:, None], interleaved)
    expected, expected_scale = quantize_tokens(turned.float(), 5)
    assert torch.equal(q[..., :d].float(), expected)
    assert torch.equal(scale, expected_scale)


def test_rotary_of_what_is_not_finite():
    x = random(1, 2, 4, 32)
    x[0, 1, 2, 3] = math.inf
    ones = torch.ones(4, 16)
    q, scale = rotary.quantize_rotary(x, ones, ones)
    assert scale.isnan().nonzero().tolist() == [[0, 1, 2]]
    assert (q[0, 1, 2] == 0).all()


def test_nothing_is_read_out_of_bounds():
    def run(at_start):
        for m, k in ((3, 17), (2, 8300)):
            x, residual = guarded(random(m, k), at_start), guarded(random(m, k), at_start)
            weight = guarded(random(k), at_start)
            norm.quantize_norm(x, weight, weight, 1e-5, True, residual)
        x, angle = guarded(random(2, 1, 5, 24), at_start), guarded(random(5, 8), at_start)
        for interleaved in (False, True):
            rotary.quantize_rotary(x, angle, angle, interleaved=interleaved)
            rotary.quantize_rotary(x, angle, angle, guarded(torch.arange(5), at_start), interleaved=interleaved)

    assert outcome(lambda: run(False)) == "ok"
    assert outcome(lambda: run(True)) == "ok"


def test_unsupported_says_why():
    assert norm.unsupported(8, True) is None
    assert "7" in norm.unsupported(8, False)
    assert rotary.unsupported(64, 64, 8) is None
    assert "even" in rotary.unsupported(64, 33, 8)
    assert "1024" in rotary.unsupported(2048, 64, 8)
    assert "bits" in rotary.unsupported(64, 64, 9)
