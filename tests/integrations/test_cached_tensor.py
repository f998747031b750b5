"""Tensors that stand for the keys and values of a cache."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tcompress import KVCache
from tcompress.integrations.cached_tensor import CachedTensor


@pytest.fixture
def cache() -> KVCache:
    torch.manual_seed(0)
    cache = KVCache()
    cache.append(torch.randn(2, 2, 9, 16), torch.randn(2, 2, 9, 8))
    return cache


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_looks_like_what_it_stands_for(dtype):
    cache = KVCache()
    cache.append(torch.randn(2, 2, 9, 16).to(dtype), torch.randn(2, 2, 9, 8).to(dtype))
    for part, real in (("keys", cache.keys()), ("values", cache.values())):
        tensor = CachedTensor(cache, part)
        assert isinstance(tensor, torch.Tensor)
        assert (tensor.shape, tensor.dtype, tensor.device) == (real.shape, dtype, real.device)
        assert tensor.size(-2) == 9
        assert not tensor.requires_grad
        assert part in repr(tensor)


def test_asking_for_its_shape_makes_no_floats(cache, monkeypatch):
    monkeypatch.setattr(KVCache, "keys", lambda self: pytest.fail("made floats"))
    tensor = CachedTensor(cache, "keys")
    assert (tensor.shape[2], tensor.dim(), tensor.numel(), tensor.ndim) == (9, 4, 576, 4)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_any_use_gives_the_floats(cache, mode):
    keys, values = cache.keys(), cache.values()
    k, v = CachedTensor(cache, "keys"), CachedTensor(cache, "values")
    q = torch.randn(2, 4, 3, 16)
    with mode():
        for got, expected in (
            (k + 1, keys + 1),
            (k[:, :, -1], keys[:, :, -1]),
            (torch.cat([k, k], 2), torch.cat([keys, keys], 2)),
            (k.repeat_interleave(2, 1), keys.repeat_interleave(2, 1)),
            (torch.matmul(q[:, :2], k.transpose(2, 3)), q[:, :2] @ keys.mT),
            (
                F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
                F.scaled_dot_product_attention(q, keys, values, enable_gqa=True),
            ),
            (F.scaled_dot_product_attention(q, key=k.repeat(1, 2, 1, 1), value=v.repeat(1, 2, 1, 1)), None),
            (k.clone(), keys),
            (k.to(torch.float64), keys.double()),
        ):
            assert type(got) is torch.Tensor
            assert expected is None or torch.equal(got, expected)
    assert torch.equal(k.materialize(), keys)
    assert torch.equal(torch.from_numpy(k.clone().numpy()), keys)


def test_it_holds_for_the_cache_as_it_was(cache):
    tensor = CachedTensor(cache, "keys")
    cache.append(torch.randn(2, 2, 1, 16), torch.randn(2, 2, 1, 8))
    for use in (lambda: tensor + 1, tensor.materialize, lambda: tensor.current_cache):
        with pytest.raises(RuntimeError, match="keys: got those of a cache that has changed"):
            use()


def test_it_is_read_only(cache):
    tensor = CachedTensor(cache, "values")
    before = cache.values()
    for write in (lambda: tensor.mul_(2), lambda: torch.add(before, 1, out=tensor), lambda: tensor.zero_()):
        with pytest.raises(RuntimeError, match="values: got written to by"):
            write()
    assert torch.equal(cache.values(), before)


def test_of_an_empty_cache():
    with pytest.raises(ValueError, match="empty"):
        CachedTensor(KVCache(), "keys")
