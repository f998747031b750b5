"""What a compared linear layer is, and what the factories of all libraries share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peer import Call, CannotRun, Peer
from shapes import LinearShape


@dataclass(frozen=True)
class LinearPeer(Peer):
    """A linear layer.

    Attributes:
        factory: `(x, w, b)`, or `(x, w, b, group)` where `group` is set; x [M, K], w [N, K], b [N], all float32.
        group: weights along K that share a scale; None: a whole output channel.
        scale_bits: bits of everything that a group (or channel) stores beside its weights: scale and zero point.
    """

    tolerance: float = 0.05
    group: int | None = None
    scale_bits: int = 32

    def build(self, *inputs: Any) -> Call:
        return super().build(*inputs) if self.group is None else super().build(*inputs, self.group)

    def read_bytes(self, shape: LinearShape) -> int:
        """Of the packed weight with its scales."""
        scales = shape.n * (shape.k // self.group) if self.group else shape.n if self.bits < 16 else 0
        return (shape.n * shape.k * self.bits + scales * self.scale_bits) // 8


def module(w: torch.Tensor, b: torch.Tensor) -> torch.nn.Linear:
    """A `torch.nn.Linear` around w [N, K] and b [N]."""
    linear = torch.nn.Linear(w.shape[1], w.shape[0], device="meta")
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    linear.bias = torch.nn.Parameter(b, requires_grad=False)
    return linear.eval()


def quantize_groups(w: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric 4-bit integers, rounded to nearest: `w ≈ q * scale` within each group of K.

    Returns:
        q int8 [N, K/group, group] in -7 … 7, scale float32 [N, K/group, 1].
    """
    groups = w.unflatten(1, (-1, group))
    scale = groups.abs().amax(2, keepdim=True).clamp(min=1e-10) / 7
    return (groups / scale).round().to(torch.int8), scale


def pack_nibbles(q: torch.Tensor) -> torch.Tensor:
    """Puts 4-bit integers 0 … 15 two a byte along the last dimension, the first in the low half; uint8."""
    return (q[..., 0::2] | (q[..., 1::2] << 4)).to(torch.uint8).contiguous()


def torch_fp32(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    linear = module(w, b)
    return lambda: linear(x)


def torch_bf16(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    linear, x = module(w, b).bfloat16(), x.bfloat16()
    return lambda: linear(x)


def tcompress_linear(scheme: str) -> Callable[..., Call]:
    """Our layer with the weight rounded to nearest under `scheme`."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int | None = None) -> Call:
        from tcompress.nn import QuantizedLinear
        from tcompress.quantize.scheme import Scheme

        try:
            named = Scheme.named(scheme)
        except ValueError as error:
            raise CannotRun(f"this version of tcompress has no scheme {scheme}") from error
        linear = QuantizedLinear.from_linear(module(w, b), named)
        return lambda: linear(x)

    return factory


#: Beside every quantized op; the first is the baseline.
FLOATS = {"torch-fp32": LinearPeer(torch_fp32, 32), "torch-bf16": LinearPeer(torch_bf16, 16)}
