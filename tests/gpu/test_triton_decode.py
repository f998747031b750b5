"""Decode attention over the int8 cache in Triton's interpreter, against float64 of what the cache holds."""

from __future__ import annotations

import math
import sys

import pytest
import torch
import triton_cases

triton_cases.require()

from guarded import guarded, outcome  # noqa: E402
from tcompress.kernels.triton.bindings import kv_cache_attention_unsupported as unsupported  # noqa: E402
from tcompress.kernels.triton.decode import decode_tile, kv_cache_attention  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402

import tcompress.ops  # noqa: E402, F401
from tcompress.ops.attention_numbers import quantize_tokens  # noqa: E402
from tcompress.ops.attention_reference import Visible  # noqa: E402
from tcompress.packing import kv_cache as layout  # noqa: E402

append = sys.modules["tcompress.ops.kv_cache_append"]
op = sys.modules["tcompress.ops.kv_cache_attention"]


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cache(k, v, room=None):
    """A cache that holds k and v; what lies behind them is not zero, as after a longer sequence."""
    (b, h, s, d), dv = k.shape, v.shape[3]
    blocks = room or -(-s // layout.BLOCK)
    tensors = (
        torch.full((b, h, blocks, layout.key_bytes(d)), 99, dtype=torch.int8),
        torch.full((b, h, blocks, layout.BLOCK), math.nan),
        torch.full((b, h, blocks, layout.value_bytes(dv)), -99, dtype=torch.int8),
        torch.full((b, h, blocks, layout.BLOCK), math.nan),
        torch.zeros(b, h, d),
    )
    append.reference(*tensors, k, v, 0)
    return tensors


def exact(q, tensors, mask, length, dv, bottom_right, left, right, softcap, scale):
    """Attention of the quantized queries over the dequantized cache in float64: output, logarithm, and what is seen."""
    k_data, k_scale, v_data, v_scale, k_mean = tensors
    (b, h, sq, d), groups = q.shape, q.shape[1] // k_data.shape[1]
    k = layout.unpack_keys(k_data, length, d).double() * k_scale.flatten(2)[..., :length, None].double()
    v = layout.unpack_values(v_data, length, dv).double() * v_scale.flatten(2)[..., :length, None].double()
    k, v, mean = (t.repeat_interleave(groups, 1) for t in (k, v, k_mean.double()))
    integers, step = quantize_tokens(q.float(), 8)
    shift = (q.double() @ mean[..., None]) * scale
    s = (integers.double() * step[..., None].double()) @ k.mT * scale
    if softcap:
        s = softcap * torch.tanh((s + shift) / softcap)
    seen = Visible(bottom_right, left, right).block(sq, length, torch.arange(length)).expand(b, h, sq, length)
    if mask is not None:
        seen = seen & (mask if mask.dtype == torch.bool else mask != -math.inf)
        s = s if mask.dtype == torch.bool else s + mask.double().nan_to_num(neginf=0)
    s = s.masked_fill(~seen, -math.inf)
    lse = torch.logsumexp(s, -1)
    out = torch.exp(s - lse.masked_fill(torch.isinf(lse), 0)[..., None]) @ v
    return out, lse if softcap else lse + shift[..., 0], seen


def check(q, k, v, mask=None, bottom_right=True, left=-1, right=0, softcap=0.0, scale=None, tile=None, room=None):
    length, dv = k.shape[2], v.shape[3]
    scale = q.shape[3] ** -0.5 if scale is None else scale
    tensors = cache(k, v, room)
    options = (bottom_right, left, right, softcap, scale)
    out, lse = kv_cache_attention(q, *tensors, mask, length, dv, *options, True, tile)
    expected, expected_lse, seen = exact(q, tensors, mask, length, dv, *options)
    empty = ~seen.any(-1)
    assert out.dtype == q.dtype
    assert out.shape == (*q.shape[:3], dv)
    assert out.transpose(1, 2).is_contiguous()
    assert (out[empty] == 0).all()
    assert (lse[empty] == -math.inf).all()
    # weights have 11 bits, the result what its type has
    limit = 1e-3 + {torch.float32: 0, torch.float16: 1e-3, torch.bfloat16: 8e-3}[q.dtype]
    assert (out - expected)[~empty].norm() <= limit * expected[~empty].norm()
    torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], rtol=1e-5, atol=1e-5)
    reference, reference_lse = op.reference(q, *tensors, mask, length, dv, *options, True)
    assert (out.double() - reference.double()).norm() <= 2 * limit * reference.double().norm()
    torch.testing.assert_close(lse, reference_lse, rtol=1e-3, atol=1e-3)


SHAPES = [  # B, H, Hkv, Sq, length, D, Dv
    (1, 1, 1, 1, 1, 64, 64),
    (2, 4, 2, 1, 63, 32, 16),
    (1, 8, 1, 1, 65, 128, 128),
    (1, 2, 2, 3, 300, 40, 33),
    (1, 6, 2, 7, 130, 20, 70),
    (1, 1, 1, 70, 129, 64, 64),
    (1, 2, 1, 2, 64, 200, 256),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, slow(torch.float16), slow(torch.float32)])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, dtype):
    b, h, hkv, sq, length, d, dv = shape
    q = random(b, sq, h, d, dtype=dtype).transpose(1, 2)
    check(q, random(b, hkv, length, d, dtype=dtype, seed=1) + 1, random(b, hkv, length, dv, dtype=dtype, seed=2))


@pytest.mark.parametrize("split", [slow(1), slow(2), 3, slow(7)])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_splits_masks_and_softcap(split, softcap, mask):
    q, k, v = random(1, 4, 3, 32), random(1, 2, 400, 32, seed=1) * 2 + 1, random(1, 2, 400, 32, seed=2)
    if mask == "bool":
        mask = random(1, 4, 3, 400, seed=3) > 0.5
        mask[0, 1] = False
        mask[0, 2, :, 100:] = False  # later splits of this head see nothing
    elif mask == "float":
        mask = random(1, 1, 3, 400, seed=3)
        mask[0, 0, 1, 5:] = -math.inf
        mask = mask.expand(1, 4, 3, 400)
    check(q, k, v, mask, right=-1, softcap=softcap, tile=TileConfig(16, 64, split=split), room=9)


WINDOWS = [(True, 10, 0), (True, 100, 5), (False, -1, 0), (False, 3, 2), (True, 0, 0), (True, -1, -1)]


@pytest.mark.parametrize(("bottom_right", "left", "right"), WINDOWS)
def test_windows(bottom_right, left, right):
    q, k, v = random(1, 2, 9, 32), random(1, 1, 270, 32, seed=1), random(1, 1, 270, 32, seed=2)
    check(q, k, v, None, bottom_right, left, right)
    check(q, k, v, None, bottom_right, left, right, tile=TileConfig(16, 64, split=3))


def test_a_window_past_the_end_sees_nothing():
    q, k, v = random(1, 2, 3, 32), random(1, 1, 5, 32, seed=1), random(1, 1, 5, 32, seed=2)
    tensors = cache(k, v)
    out, lse = kv_cache_attention(q, *tensors, None, 1, 32, True, -1, 0, 0.0, 1.0, True)
    assert (out[:, :, :2] == 0).all()
    assert (out[:, :, 2] != 0).any()
    assert (lse[:, :, :2] == -math.inf).all()
    out, lse = kv_cache_attention(q, *tensors, None, 0, 32, True, -1, 0, 0.0, 1.0, True)
    assert (out == 0).all()
    assert (lse == -math.inf).all()


def test_negative_scale():
    check(random(1, 2, 1, 64), random(1, 1, 90, 64, seed=1), random(1, 1, 90, 64, seed=2), scale=-0.2)


@pytest.mark.parametrize("split", [1, 3])
def test_what_is_not_finite_spoils_who_sees_it(split):
    q, k, v = random(1, 2, 60, 32), random(1, 1, 200, 32, seed=1), random(1, 1, 200, 32, seed=2)
    q[0, 1, 7, 3] = math.nan
    k[0, 0, 150, 0], v[0, 0, 160, 1] = math.inf, math.nan
    tensors = cache(k, v)
    options = (True, 5, 0, 0.0, 0.2, True)
    out, lse = kv_cache_attention(q, *tensors, None, 200, 32, *options, TileConfig(16, 64, split=split))
    reference, reference_lse = op.reference(q, *tensors, None, 200, 32, *options)
    assert reference.isnan().any()
    assert not reference.isnan().all()
    assert torch.equal(out.isnan(), reference.isnan())
    assert torch.equal(lse.isnan(), reference_lse.isnan())


def test_zeros_and_large_scales():
    q, k, v = random(1, 1, 1, 32), torch.zeros(1, 1, 100, 32), random(1, 1, 100, 32) * 1e6
    v[0, 0, :64] = 0
    check(q, k, v)
    check(q * 1e4, random(1, 1, 100, 32, seed=3) * 1e4, random(1, 1, 100, 32))


@pytest.mark.parametrize("shape", [(0, 1, 1, 1, 8, 8), (1, 2, 0, 1, 8, 8), (1, 2, 1, 3, 8, 0), (1, 1, 1, 3, 0, 8)])
def test_empty_axes(shape):
    b, h, sq, length, d, dv = shape
    tensors = cache(random(b, h, length, d), random(b, h, length, dv))
    out, _ = kv_cache_attention(random(b, h, sq, d), *tensors, None, length, dv, True, -1, 0, 0.0, 1.0, False)
    assert out.shape == (b, h, sq, dv)
    if out.numel():  # no channels: all scores are 0
        assert out.isfinite().all()


@pytest.mark.parametrize("shape", [(1, 2, 1, 1, 65, 40, 33), (2, 4, 2, 3, 128, 64, 64)])
def test_nothing_is_read_out_of_bounds(shape):
    b, h, hkv, sq, length, d, dv = shape

    def run(at_start):
        q = guarded(random(b, h, sq, d), at_start)
        tensors = [guarded(t, at_start) for t in cache(random(b, hkv, length, d), random(b, hkv, length, dv))]
        mask = guarded(torch.zeros(b, h, sq, length), at_start)
        for split in (1, 2):
            for options in ((True, 7, 0, 0.0, 1.0, True), (False, -1, -1, 3.0, 1.0, False)):
                kv_cache_attention(q, *tensors, mask, length, dv, *options, TileConfig(16, 64, split=split))

    assert outcome(lambda: run(False)) == "ok"
    assert outcome(lambda: run(True)) == "ok"


def test_unsupported_says_why():
    tensors = cache(random(1, 1, 4, 32), random(1, 1, 4, 32))
    assert unsupported(random(1, 1, 1, 32), *tensors, None, 4, 32, True, -1, 0, 0.0, 1.0, True) is None
    assert "256" in unsupported(random(1, 1, 1, 300), *tensors, None, 4, 32, True, -1, 0, 0.0, 1.0, True)


def test_a_long_cache_is_split():
    assert decode_tile(90, 4, 128, 8, 500).split > 8
    assert decode_tile(90, 4, 128, 1, 1).split == 1
    assert decode_tile(90, 100, 256, 0, 0).split >= 1
