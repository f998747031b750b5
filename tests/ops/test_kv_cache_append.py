"""kv_cache_append: the integers against an independent computation, every path against the reference, bit for bit."""

import attention_oracle as exact
import cases
import oracle
import pytest
import torch
from attention_samples import empty_cache

from tcompress import ops, use_backend, use_cpu_path
from tcompress.packing import kv_cache as layout

SHAPES = [(1, 1, 1, 1, 1), (2, 3, 63, 18, 5), (1, 2, 64, 64, 64), (2, 1, 65, 33, 47), (1, 1, 200, 256, 129)]


def tokens(b, h, s, d, dv, dtype=torch.float32):
    k = torch.randn(b, h, s, d, generator=cases.generator(("k", s, d)))
    v = torch.randn(b, h, s, dv, generator=cases.generator(("v", s, dv)))
    return (k + 3).to(dtype), v.to(dtype)


def filled(k, v, parts, blocks=None):
    """A cache to which k and v were appended, cut at `parts`."""
    b, h, s, d = k.shape
    cache = empty_cache(b, h, blocks or -(-s // 64), d, v.shape[3])
    for begin, end in zip([0, *parts], [*parts, s], strict=True):
        ops.kv_cache_append(*cache, k[:, :, begin:end], v[:, :, begin:end], begin)
    return cache


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_integers_of_the_reference(shape):
    *_, s, d, dv = shape
    k, v = tokens(*shape)
    with use_backend("reference"):
        k_data, k_scale, v_data, v_scale, mean = filled(k, v, [])
    expected_mean = exact.key_mean(k.numpy())
    assert torch.equal(mean, torch.from_numpy(expected_mean))
    for data, scale, x, unpack, width in (
        (k_data, k_scale, k.numpy() - expected_mean[..., None, :], layout.unpack_keys, d),
        (v_data, v_scale, v.numpy(), layout.unpack_values, dv),
    ):
        q, expected_scale = exact.quantize_tokens(x, 8)
        assert (unpack(data, s, width).numpy() == q).all()
        assert (scale.flatten(2)[..., :s].numpy() == expected_scale).all()


@pytest.mark.parametrize("path", cases.CPU_PATHS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bit_exact(path, shape):
    s = shape[2]
    for dtype in cases.DTYPES:
        k, v = tokens(*shape, dtype)
        k = k.transpose(1, 2).contiguous().transpose(1, 2)
        for parts in ([], [s // 3 + 1] if s > 2 else [], list(range(1, min(s, 20)))):
            with use_backend("reference"):
                expected = filled(k, v, parts)
            with use_backend("cpu"), use_cpu_path(path):
                got = filled(k, v, parts)
            assert all(map(oracle.same_bits, got, expected)), (dtype, parts)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_token_by_token_is_all_at_once(backend):
    """But for the mean, which the first tokens set."""
    k, v = tokens(1, 2, 150, 20, 24)
    with use_backend(backend):
        first = filled(k, v, [10])
        one_by_one = filled(k, v, list(range(10, 150)))
    assert all(map(torch.equal, first, one_by_one))


@pytest.mark.parametrize("path", cases.CPU_PATHS)
def test_tokens_that_are_not_finite(path):
    k, v = tokens(1, 1, 70, 16, 16)
    k[0, 0, 3, 5], k[0, 0, 20, 0], v[0, 0, 66, 1] = float("nan"), float("inf"), float("-inf")
    v[0, 0, 5] = 0
    with use_cpu_path(path):
        _, k_scale, v_data, v_scale, mean = filled(k, v, [])
    assert torch.isfinite(mean).all()
    assert torch.isnan(k_scale.flatten()[:70]).nonzero().flatten().tolist() == [3, 20]
    assert torch.isnan(v_scale.flatten()[:70]).nonzero().flatten().tolist() == [66]
    assert not layout.unpack_values(v_data, 70, 16)[0, 0, [5, 66]].any()


def test_no_tokens():
    cache = empty_cache(1, 1, 1, 8, 8)
    cache[4].fill_(7)
    ops.kv_cache_append(*cache, torch.zeros(1, 1, 0, 8), torch.zeros(1, 1, 0, 8), 0)
    assert (cache[4] == 7).all()


def test_arguments():
    cache = empty_cache(1, 2, 1, 8, 8)
    k, v = tokens(1, 2, 5, 8, 8)
    with pytest.raises(TypeError, match="kv_cache_append: k: got torch.int32, expected float32"):
        ops.kv_cache_append(*cache, k.int(), v, 0)
    with pytest.raises(ValueError, match="of one type"):
        ops.kv_cache_append(*cache, k, v.half(), 0)
    with pytest.raises(ValueError, match="k_data: got"):
        ops.kv_cache_append(*cache, k[..., :3], v, 0)
    with pytest.raises(ValueError, match="batch and heads of the cache"):
        ops.kv_cache_append(*cache, k[:, :1], v[:, :1], 0)
    with pytest.raises(ValueError, match="length: got 60 and 5 new tokens, expected at most 64 tokens"):
        ops.kv_cache_append(*cache, k, v, 60)
    with pytest.raises(TypeError, match="k_scale: got torch.float64, expected torch.float32"):
        ops.kv_cache_append(cache[0], cache[1].double(), *cache[2:], k, v, 0)
    assert all(not t.any() for t in cache)
