"""Small arguments of the attention ops, in the order of their schemas; `cases.SAMPLES` takes them in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tcompress.packing import kv_cache as layout


def _normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _attention() -> Iterator[tuple[Any, ...]]:
    q, k, v = _normal(2, 4, 7, 10), _normal(2, 2, 70, 10), _normal(2, 2, 70, 5)
    yield (q, k, v, None, 12, False, -1, -1, 0.0, 0.3, False)
    keep = (_normal(1, 4, 1, 70) > 0).expand(2, 4, 7, 70)
    yield (q.bfloat16(), k.bfloat16(), v.bfloat16(), keep, 8, True, 20, 0, 5.0, -0.3, True)
    heads_last = [x.half().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    yield (*heads_last, _normal(7, 70).expand(2, 4, 7, 70), 12, False, -1, 3, 0.0, 0.1, True)
    yield (q, k[:, :, :0], v[:, :, :0], None, 8, False, -1, 0, 0.0, 0.3, True)


def _short() -> Iterator[tuple[Any, ...]]:
    q, k, v = _normal(2, 4, 7, 10), _normal(2, 2, 9, 10), _normal(2, 2, 9, 5)
    yield (q, k, v, 9, 0.3)
    yield (q.bfloat16(), k.bfloat16(), v.bfloat16(), 1, -0.3)
    heads_last = [x.half().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    yield (*heads_last, -2, 0.1)
    yield (q, k[:, :, :0], v[:, :, :0], 0, 0.3)


def _varlen() -> Iterator[tuple[Any, ...]]:
    q, k, v = _normal(9, 4, 10), _normal(75, 2, 10), _normal(75, 2, 5)
    offsets, key_offsets = torch.tensor([0, 4, 4, 9]), torch.tensor([0, 70, 72, 75])
    yield (q, k, v, offsets, key_offsets, 12, False, -1, -1, 0.0, 0.3, False)
    halves = (q.bfloat16(), k.bfloat16(), v.bfloat16())
    yield (*halves, offsets, key_offsets, 8, True, 20, 0, 5.0, -0.3, True)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    yield (*strided, offsets, key_offsets, 8, False, -1, 0, 0.0, 0.3, True)


def empty_cache(b: int, hkv: int, blocks: int, d: int, dv: int) -> tuple[torch.Tensor, ...]:
    """k_data, k_scale, v_data, v_scale and k_mean of a cache without tokens."""
    return (
        torch.zeros(b, hkv, blocks, layout.key_bytes(d), dtype=torch.int8),
        torch.zeros(b, hkv, blocks, layout.BLOCK),
        torch.zeros(b, hkv, blocks, layout.value_bytes(dv), dtype=torch.int8),
        torch.zeros(b, hkv, blocks, layout.BLOCK),
        torch.zeros(b, hkv, d),
    )


def _append() -> Iterator[tuple[Any, ...]]:
    k, v = _normal(2, 2, 70, 10), _normal(2, 2, 70, 5)
    yield (*empty_cache(2, 2, 2, 10, 5), k, v, 0)
    yield (*empty_cache(2, 2, 2, 10, 5), k.half()[:, :, 1:4], v.half()[:, :, 1:4], 62)
    yield (*empty_cache(2, 2, 2, 10, 5), k[:, :, :0], v[:, :, :0], 0)


def _cache_attention() -> Iterator[tuple[Any, ...]]:
    cache = empty_cache(2, 2, 2, 10, 5)
    torch.ops.tcompress.kv_cache_append(*cache, _normal(2, 2, 70, 10), _normal(2, 2, 70, 5), 0)
    q = _normal(2, 4, 3, 10)
    yield (q, *cache, None, 70, 5, False, -1, -1, 0.0, 0.3, False)
    keep = (_normal(1, 4, 1, 69) > 0).expand(2, 4, 3, 69)
    yield (q.bfloat16(), *cache, keep, 69, 5, True, 20, 0, 0.0, 0.3, True)
    yield (q[:, :, :1], *cache, None, 70, 5, True, -1, 0, 0.0, 0.3, False)
    yield (q, *cache, None, 0, 5, True, -1, 0, 0.0, 0.3, True)


SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "quantized_attention": tuple(_attention()),
    "short_attention": tuple(_short()),
    "quantized_attention_varlen": tuple(_varlen()),
    "kv_cache_append": tuple(_append()),
    "kv_cache_attention": tuple(_cache_attention()),
}
