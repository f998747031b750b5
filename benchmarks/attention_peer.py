"""What a compared attention is; torch's and ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peer import Call, CannotRun, Peer
from shapes import AttentionShape


@dataclass(frozen=True)
class AttentionPeer(Peer):
    """An attention.

    Attributes:
        factory: `(q, k, v, causal)`; q [B, H, Sq, D], k and v [B, Hkv, Skv, D], all float32. Result [B, H, Sq, D].
        row_bits: bits that a token of a head of K (or V) stores beside its elements: scales.
        tolerance: largest Σ|Δ| / Σ|O|.
    """

    tolerance: float = 0.01
    row_bits: int = 0

    def read_bytes(self, shape: AttentionShape) -> int:
        """Of K and V with their scales."""
        return 2 * shape.b * shape.h_kv * shape.skv * (shape.d * self.bits + self.row_bits) // 8


def torch_sdpa(dtype: torch.dtype) -> Callable[..., Call]:
    """`scaled_dot_product_attention` as torch chooses: on the CPU its flash attention."""

    def factory(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        grouped = q.shape[1] != k.shape[1]
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return lambda: sdpa(q, k, v, is_causal=causal, enable_gqa=grouped)

    return factory


def torch_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """torch's attention that writes all scores out."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    call = torch_sdpa(torch.float32)(q, k, v, causal)

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return call()

    return run


def tcompress_attention(bits: Literal["auto", 8, 12]) -> Callable[..., Call]:
    """Our attention on float q, k and v, which it quantizes in the call."""

    def factory(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
        import tcompress

        if not hasattr(tcompress, "quantized_attention"):
            raise CannotRun("this version of tcompress has no quantized_attention")
        options: dict[str, Any] = {"bits": bits, "is_causal": causal, "enable_gqa": q.shape[1] != k.shape[1]}
        attend: Callable[..., Any] = tcompress.quantized_attention
        return lambda: attend(q, k, v, **options)

    return factory


def tcompress_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """Our attention over int8 keys and values, quantized before the call."""
    import tcompress

    if not hasattr(tcompress, "KVCache"):
        raise CannotRun("this version of tcompress has no KVCache")
    cache = tcompress.KVCache()
    cache.append(k, v)
    return lambda: cache.attention(q, is_causal=causal)
