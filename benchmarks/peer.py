"""What a compared linear layer is, and what the factories of all libraries share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Runs the layer once on the input it was made with.
Linear = Callable[[], torch.Tensor]


class CannotRun(Exception):
    """Why a peer does not run here: a missing package, another processor, a shape it does not take."""


@dataclass(frozen=True)
class Peer:
    """One line of a table.

    Attributes:
        factory: `(x, w, b)`, or `(x, w, b, group)` where `group` is set; x [M, K], w [N, K], b [N], all float32.
        bits: of a stored weight, without scales.
        group: weights along K that share a scale; None: a whole output channel.
        scale_bits: bits of everything that a group (or channel) stores beside its weights: scale and zero point.
        tolerance: largest relative error against float64 that the layer may have.
    """

    factory: Callable[..., Linear]
    bits: int
    group: int | None = None
    scale_bits: int = 32
    tolerance: float = 0.05

    def build(self, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
        """The layer around the given weight, input and bias.

        Raises:
            CannotRun: with the reason.
        """
        try:
            return self.factory(x, w, b) if self.group is None else self.factory(x, w, b, self.group)
        except ModuleNotFoundError as error:
            raise CannotRun(f"the package {error.name} is not installed") from error

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of the packed weight with its scales, which every call reads once at least."""
        scales = n * (k // self.group) if self.group else n if self.bits < 16 else 0
        return (n * k * self.bits + scales * self.scale_bits) // 8


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


def torch_fp32(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
    linear = module(w, b)
    return lambda: linear(x)


def torch_bf16(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
    linear, x = module(w, b).bfloat16(), x.bfloat16()
    return lambda: linear(x)


def tcompress_linear(scheme: str) -> Callable[..., Linear]:
    """Our layer with the weight rounded to nearest under `scheme`."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int | None = None) -> Linear:
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
FLOATS = {"torch-fp32": Peer(torch_fp32, 32), "torch-bf16": Peer(torch_bf16, 16)}
