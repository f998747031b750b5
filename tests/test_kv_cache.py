"""KVCache: what it holds, that it stays whole, and its attention against torch's in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import tcompress
from tcompress import KVCache, quantized_attention
from tcompress.ops import kv_cache_append

BLOCK = 64
#: Relative error of attention on 8 bits, normal inputs, against float64; see `quantized_attention`.
ERROR = 0.02


def _kv(s: int, *, batch: int = 2, heads: int = 2, d: int = 24, dv: int = 16, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, heads, s, n, generator=generator) for n in (d, dv))
    return [k + 3 * torch.randn(d, generator=generator), v]  # keys have a bias per channel, as models' do


def _filled(s: int, **sizes: int) -> tuple[KVCache, torch.Tensor, torch.Tensor]:
    k, v = _kv(s, **sizes)
    cache = KVCache()
    cache.append(k, v)
    return cache, k, v


def _expected(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), enable_gqa=True, **options)


def _error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


def _state(cache: KVCache) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return cache.keys(), cache.values(), cache.length, cache.capacity


def _assert_same(cache: KVCache, state: tuple[torch.Tensor, torch.Tensor, int, int]) -> None:
    keys, values, *counts = _state(cache)
    assert torch.equal(keys, state[0])
    assert torch.equal(values, state[1])
    assert counts == list(state[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_comes_back(dtype):
    k, v = (x.to(dtype) for x in _kv(70))
    before = k.clone(), v.clone()
    cache = KVCache()
    cache.append(k, v)
    assert torch.equal(k, before[0])
    assert torch.equal(v, before[1])
    mean = k.float().mean(2, keepdim=True)
    for got, given, spread in ((cache.keys(), k, k.float() - mean), (cache.values(), v, v.float())):
        assert got.dtype == dtype
        assert got.shape == given.shape
        # half a step of 8 bits, and the rounding of the result to its type
        bound = spread.abs().amax(-1, keepdim=True) / 254 * 1.01 + given.float().abs() * torch.finfo(dtype).eps
        assert ((got.float() - given.float()).abs() <= bound).all()
    assert cache.shapes == (tuple(k.shape), tuple(v.shape))
    assert (cache.dtype, cache.device) == (dtype, k.device)


@pytest.mark.parametrize("s", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("heads", [2, 6])
def test_attention(s, heads):
    cache, k, v = _filled(s)
    q = torch.randn(2, heads, 3, 24)
    got = cache.attention(q)
    assert got.shape == (2, heads, 3, 16)
    assert _error(got, _expected(q, k, v)) < ERROR


def test_decoding_token_by_token():
    """A prompt, then one token at a time: each step as attention over the float tokens so far."""
    k, v = _kv(135)
    q = torch.randn(2, 4, 135, 24)
    cache = KVCache()
    cache.append(k[:, :, :125], v[:, :, :125])
    got = [cache.attention(q[:, :, :125], is_causal="bottom_right")]
    for t in range(125, 135):
        cache.append(k[:, :, t : t + 1], v[:, :, t : t + 1])
        got.append(cache.attention(q[:, :, t : t + 1], is_causal="bottom_right"))
        assert len(cache) == cache.length == t + 1
    assert _error(torch.cat(got, 2), _expected(q, k, v, is_causal=True)) < ERROR


@pytest.mark.parametrize("chunks", [[64, 64, 7], [1, 134], [50, 20, 65], [135]])
def test_chunked_prefill(chunks):
    k, v = _kv(135)
    q = torch.randn(2, 2, 135, 24)
    cache, got = KVCache(), []
    for k_new, v_new, q_new in zip(k.split(chunks, 2), v.split(chunks, 2), q.split(chunks, 2), strict=True):
        cache.append(k_new, v_new)
        got.append(cache.attention(q_new, is_causal="bottom_right"))
    assert _error(torch.cat(got, 2), _expected(q, k, v, is_causal=True)) < ERROR


def test_a_token_is_the_same_alone_and_in_a_chunk():
    k, v = _kv(135)
    alone, together = KVCache(), KVCache()
    for cache, chunks in ((alone, [60] + 75 * [1]), (together, [60, 75])):
        for new in zip(k.split(chunks, 2), v.split(chunks, 2), strict=True):
            cache.append(*new)
    assert torch.equal(alone.keys(), together.keys())
    assert torch.equal(alone.values(), together.values())


def test_options_reach_the_op():
    cache, k, v = _filled(70)
    q = torch.randn(2, 4, 70, 24)
    mask = torch.rand(2, 1, 70, 70) > 0.3
    options = {"mask": mask, "is_causal": True, "scale": 0.3, "window": 20, "softcap": 5.0}
    got, lse = cache.attention(q, **options, return_lse=True)
    # One append: the mean is that of quantized_attention too, so the numbers are the same up to the order of sums.
    expected, expected_lse = quantized_attention(q, k, v, bits=8, enable_gqa=True, **options, return_lse=True)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(lse, expected_lse)
    for name in options:
        fewer, _ = cache.attention(q, **{**options, name: None if name != "is_causal" else False}, return_lse=True)
        assert not torch.allclose(fewer, got), name


def test_softcap():
    """It is applied to whole scores, although the cache holds keys less a mean, of the first tokens here."""
    k, v = _kv(90)
    cache = KVCache()
    cache.append(k[:, :, :20], v[:, :, :20])
    cache.append(k[:, :, 20:], v[:, :, 20:])
    q = torch.randn(2, 2, 5, 24)
    scores = q.double() @ k.double().mT / math.sqrt(24)
    expected = (2 * torch.tanh(scores / 2)).softmax(-1) @ v.double()
    assert _error(expected.float(), scores.softmax(-1) @ v.double()) > 10 * ERROR
    assert _error(cache.attention(q, softcap=2.0), expected) < ERROR


def test_crop():
    """After a crop it is as if the dropped tokens had never been there."""
    k, v = _kv(140)
    cropped, never = KVCache(), KVCache()
    for cache in (cropped, never):
        cache.append(k[:, :, :70], v[:, :, :70])
    cropped.append(k[:, :, 70:] * 100, v[:, :, 70:] * math.inf)
    capacity = cropped.capacity
    cropped.crop(70)
    q = torch.randn(2, 2, 1, 24)
    assert torch.equal(cropped.attention(q), never.attention(q))
    assert cropped.capacity == capacity
    for cache in (cropped, never):
        cache.append(k[:, :, 70:], v[:, :, 70:])
    assert torch.equal(cropped.attention(q), never.attention(q))
    assert torch.equal(cropped.keys(), never.keys())


@pytest.mark.parametrize("empty", [lambda cache: cache.crop(0), lambda cache: cache.reset()], ids=["crop", "reset"])
def test_the_mean_is_set_anew_when_empty(empty):
    cache, _, _ = _filled(70)
    empty(cache)
    assert len(cache) == 0
    k, v = _kv(30, seed=1)
    cache.append(k - 50, v)
    fresh = KVCache()
    fresh.append(k - 50, v)
    assert torch.equal(cache.keys(), fresh.keys())


def test_reset_takes_other_shapes():
    cache, _, _ = _filled(70)
    cache.reset()
    assert not cache.is_allocated
    assert cache.nbytes == cache.capacity == 0
    k, v = (x.bfloat16() for x in _kv(3, batch=5, heads=1, d=8, dv=8))
    cache.append(k, v)
    assert cache.keys().shape == k.shape


def test_beam_search_moves():
    cache, _, _ = _filled(70, batch=3)
    keys, values = cache.keys(), cache.values()
    cache.reorder(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.keys(), keys[[2, 0, 0]])
    cache.batch_repeat(2)
    assert torch.equal(cache.values(), values[[2, 2, 0, 0, 0, 0]])
    cache.batch_select(torch.tensor([1, 4], dtype=torch.int32))
    assert torch.equal(cache.keys(), keys[[2, 0]])
    # sequences go their own ways afterwards
    k, v = _kv(1, seed=1)
    cache.append(k, v)
    q = torch.randn(2, 2, 1, 24)
    all_keys, all_values = torch.cat([keys[[2, 0]], k], 2), torch.cat([values[[2, 0]], v], 2)
    assert _error(cache.attention(q), _expected(q, all_keys, all_values)) < ERROR


def test_room_doubles_and_bytes_are_counted():
    cache = KVCache()
    assert (cache.capacity, cache.nbytes, cache.nbytes_used, cache.float_nbytes) == (0, 0, 0, 0)
    rooms = []
    for _ in range(6):
        cache.append(*_kv(64, d=128, dv=128))
        rooms.append(cache.capacity // BLOCK)
    assert rooms == [1, 2, 4, 4, 8, 8]
    token, mean = 2 * 2 * (128 + 128 + 8), 2 * 2 * 128 * 4
    assert cache.nbytes == 8 * BLOCK * token + mean
    assert cache.nbytes_used == 6 * BLOCK * token + mean
    assert cache.float_nbytes == 6 * BLOCK * 2 * 2 * 256 * 4
    assert cache.nbytes_used / cache.float_nbytes < 0.27
    cache.append(*_kv(700, d=128, dv=128))
    assert cache.capacity == 1088, "what is needed, where that is more than double"


def test_capacity_is_reserved():
    cache = KVCache(capacity=100)
    assert cache.nbytes == 0
    cache.append(*_kv(1))
    assert cache.capacity == 128


def test_no_tokens():
    k, v = _kv(5)
    cache = KVCache()
    cache.append(k[:, :, :0], v[:, :, :0])
    assert cache.is_allocated
    assert cache.keys().shape == (2, 2, 0, 24)
    assert torch.equal(cache.attention(torch.randn(2, 2, 1, 24)), torch.zeros(2, 2, 1, 16))
    cache.append(k, v)
    cache.append(k[:, :, :0], v[:, :, :0])
    assert cache.length == 5


def test_inference_mode_and_back():
    k, v = _kv(70)
    cache = KVCache()
    with torch.inference_mode():
        cache.append(k + 0, v + 0)
        cache.reorder(torch.tensor([1, 0]))
    cache.append(*_kv(70, seed=1))
    with torch.inference_mode():
        cache.append(*_kv(1, seed=2))
    assert cache.length == 141


def test_strided_inputs():
    k, v = _kv(9)
    cache, plain = KVCache(), KVCache()
    cache.append(k.transpose(1, 2).contiguous().transpose(1, 2), v[:, :1].expand(-1, 2, -1, -1))
    plain.append(k, v[:, :1].repeat(1, 2, 1, 1))
    assert torch.equal(cache.keys(), plain.keys())
    assert torch.equal(cache.values(), plain.values())


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        (lambda k, v: (k[0], v), ValueError, "k: got [2, 3, 24]"),
        (lambda k, v: (k, v[:, :1]), ValueError, "v: got [2, 1, 3, 16], expected [2, 2, 3, 'Dv'] as k"),
        (lambda k, v: (k[:1], v[:1]), ValueError, r"got (B, Hkv, D, Dv) = (1, 2, 24, 16), expected (2, 2, 24, 16)"),
        (lambda k, v: (k[..., :8], v), ValueError, "(2, 2, 8, 16)"),
        (lambda k, v: (k, v.bfloat16()), TypeError, "as k"),
        (lambda k, v: (k.bfloat16(), v.bfloat16()), TypeError, "expected torch.float32"),
        (lambda k, v: (k.double(), v), TypeError, "k: got torch.float64"),
        (lambda k, v: (k, v.int()), TypeError, "v: got torch.int32"),
        (lambda k, v: (None, v), TypeError, "k: got NoneType"),
    ],
)
def test_refused_appends_leave_it_whole(change, kind, text):
    cache, _, _ = _filled(63)
    before = _state(cache)
    with pytest.raises(kind) as error:
        cache.append(*change(*_kv(3)))
    assert str(error.value).startswith("KVCache.append: ")
    assert text in str(error.value)
    _assert_same(cache, before)
    cache.append(*_kv(3))
    assert cache.length == 66


def test_an_append_that_fails_midway_leaves_it_whole(monkeypatch):
    cache, _, _ = _filled(64)
    before = _state(cache)

    def fails(*args: object) -> None:
        kv_cache_append(*args)
        raise MemoryError

    monkeypatch.setattr(tcompress.kv_cache, "kv_cache_append", fails)
    for tokens in (1, 200):
        with pytest.raises(MemoryError):
            cache.append(*_kv(tokens, seed=1))
        _assert_same(cache, before)
    empty = KVCache()
    with pytest.raises(MemoryError):
        empty.append(*_kv(1))
    assert not empty.is_allocated


def test_other_errors():
    with pytest.raises(ValueError, match="capacity: got -1"):
        KVCache(-1)
    cache, _, _ = _filled(5)
    for method in ("keys", "values"):
        with pytest.raises(ValueError, match=rf"KVCache.{method}: cache: got an empty one"):
            getattr(KVCache(), method)()
    with pytest.raises(ValueError, match="empty"):
        KVCache().attention(torch.randn(2, 2, 1, 24))
    for length in (-1, 6):
        with pytest.raises(ValueError, match="expected 0 to 5"):
            cache.crop(length)
    with pytest.raises(ValueError, match=r"\[3\], expected \[2\]"):
        cache.reorder(torch.tensor([0, 1, 1]))
    for index in ([0, 2], [-1, 0]):
        with pytest.raises(ValueError, match="0 to 1, places in the batch"):
            cache.reorder(torch.tensor(index))
    with pytest.raises(TypeError, match="torch.bool"):
        cache.batch_select(torch.tensor([True, False]))
    with pytest.raises(ValueError, match="one dimension"):
        cache.batch_select(torch.tensor([[0]]))
    with pytest.raises(ValueError, match="repeats: got 0"):
        cache.batch_repeat(0)
    with pytest.raises(ValueError, match="3 heads"):
        cache.attention(torch.randn(2, 3, 1, 24))
    k, v = _kv(1, d=264)
    with pytest.raises(ValueError, match="at most 256"):
        KVCache().append(k, v)
    assert cache.length == 5


def test_nan_reaches_those_who_see_it_only():
    k, v = _kv(70)
    k[0, 0, 66] = math.nan
    cache = KVCache()
    cache.append(k[:, :, :60], v[:, :, :60])
    cache.append(k[:, :, 60:], v[:, :, 60:])
    got = cache.attention(torch.randn(2, 2, 70, 24), is_causal="bottom_right")
    broken = torch.zeros(2, 2, 70, dtype=torch.bool)
    broken[0, 0, 66:] = True
    assert torch.equal(got.isnan().all(-1), broken)
    assert torch.equal(got.isnan().any(-1), broken)


def test_version_and_repr():
    assert repr(KVCache()) == "KVCache(empty)"
    cache, _, _ = _filled(5)
    shape = "batch=2, kv_heads=2, head_dim=24, head_dim_v=16, length=5, capacity=64"
    assert repr(cache) == f"KVCache({shape}, float32, 0.01 MiB, 0.00 MiB in float)"
    versions = [cache.version]
    for change in (
        lambda: cache.append(*_kv(1)),
        lambda: cache.crop(5),
        lambda: cache.reorder(torch.tensor([0, 1])),
        lambda: cache.reset(),
    ):
        change()
        versions.append(cache.version)
    assert len(set(versions)) == 5
