"""The grid of a quantized weight: its scales and zero points, and where a value lies on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tcompress.errors import message
from tcompress.packing import PackedWeight, pack_int4
from tcompress.quantize.scheme import QuantArgs

#: Scales are at least this, so that an all-zero channel needs no special case; in float16 the smallest normal number.
_MIN_SCALE = 2.0**-100
_MIN_HALF_SCALE = 2.0**-14
#: What stands for 0 where 4-bit integers are stored without zero points.
SYMMETRIC_ZERO = 8


@dataclass(frozen=True)
class Grid:
    """The values that a quantized weight [N, K] can take: `(q - zero) · scale` with whole q, for each group along K.

    ::

        symmetric:   scale = max|W| / (2^(bits-1) - 1),              zero = 0,                        |q| < 2^(bits-1)
        full range:  scale of either sign (`range_search`),          zero = 0,    -2^(bits-1) ≤ q ≤ 2^(bits-1) - 1
        asymmetric:  scale = (max(W,0) - min(W,0)) / (2^bits - 1),   zero = round(-min(W,0) / scale), 0 ≤ q < 2^bits

    Zero is always on the grid. Scales are rounded to the type they are stored in first; rounding is half to even.

    Attributes:
        args: of a `Scheme`'s weights.
        shape: (N, K).
        group_size: weights that share a scale along K; K (or 1, if that is 0) for one scale a channel.
        scale: [N, ceil(K / group_size)] as stored, never zero.
        zero: whole numbers in float32 of the same shape, or None where it is symmetric.
        full_range: whether symmetric integers take the value -2^(bits-1) too, which 4-bit storage has room for.
    """

    args: QuantArgs
    shape: tuple[int, int]
    group_size: int
    scale: torch.Tensor
    zero: torch.Tensor | None
    full_range: bool = False

    @classmethod
    def of(cls, weight: torch.Tensor, args: QuantArgs, where: str) -> Grid:
        """The grid that spans the range of a weight [N, K]; `where` begins error messages.

        Raises:
            ValueError: the weight is not two-dimensional, holds NaN or infinity, or is too large for float16 scales.
        """
        w = checked(weight, where)
        (n, k), size = w.shape, args.group_size or max(w.shape[1], 1)
        groups = grouped(w, size)
        lo, hi, q_max = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0), largest_integer(args)
        if args.symmetric:
            return cls(
                args, (n, k), size, stored_scale(torch.maximum(-lo, hi) / largest_integer(args), args, where), None
            )
        q_max = largest_integer(args)
        scale = stored_scale(hi / q_max - lo / q_max, args, where)
        return cls(args, (n, k), size, scale, torch.round(-lo / scale.float()).clamp(0, q_max))

    def integers(self, weight: torch.Tensor) -> torch.Tensor:
        """The nearest q of each weight, [N, K] float32."""
        groups = grouped(weight.detach().float(), self.group_size)
        return self.clamped(
            torch.round(groups / self.scale.float()[..., None]), None if self.zero is None else self.zero[..., None]
        ).flatten(1)[:, : self.shape[1]]

    def column(self, values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest q of column k's values [N], and what these stand for."""
        group = k // self.group_size
        scale = self.scale[:, group].float()
        zero = None if self.zero is None else self.zero[:, group]
        q = self.clamped(torch.round(values / scale), zero)
        return q, (q if zero is None else q - zero) * scale

    def clamped(self, rounded: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
        """q of whole multiples of the scale: zero added, within the limits."""
        q_max = largest_integer(self.args)
        if zero is None:
            return rounded.clamp(-q_max - self.full_range, q_max)
        return (rounded + zero).clamp(0, q_max)

    def values(self, q: torch.Tensor) -> torch.Tensor:
        """What integers [N, K] stand for, float32."""
        groups = grouped(q, self.group_size)
        centred = groups if self.zero is None else groups - self.zero[..., None]
        return (centred * self.scale.float()[..., None]).flatten(1)[:, : self.shape[1]]

    def pack(self, q: torch.Tensor) -> PackedWeight:
        """Stores integers [N, K] of this grid: up to 4 bits in layout "int4", symmetric ones with 8 added; more in
        layout "dense"."""
        n, k = self.shape
        if self.args.bits > 4:
            # A weight without inputs still has a scale for each output.
            scale = self.scale[:, 0] if k else self.scale.new_full((n,), _MIN_SCALE)
            return PackedWeight(q.to(torch.int8), scale.contiguous(), (n, k))
        stored = q + SYMMETRIC_ZERO if self.zero is None else q
        zero_point = None if self.zero is None else self.zero.to(torch.uint8)
        return PackedWeight(pack_int4(stored.to(torch.uint8)), self.scale, (n, k), "int4", zero_point, self.group_size)


def checked(weight: torch.Tensor, where: str) -> torch.Tensor:
    """A weight [N, K] in float32.

    Raises:
        ValueError: it is not two-dimensional, or holds NaN or infinity.
    """
    if weight.dim() != 2:
        raise ValueError(message(where, "weight", list(weight.shape), "[N, K]"))
    w = weight.detach().float()
    bad = int((~torch.isfinite(w)).sum())
    if bad:
        hint = "a NaN or infinite weight has no integer; repair the checkpoint"
        raise ValueError(message(where, "weight", f"{bad} values NaN or infinite", "finite", hint))
    return w


def grouped(w: torch.Tensor, size: int) -> torch.Tensor:
    """[N, K] -> [N, ceil(K/size), size], padded with zeros."""
    n, k = w.shape
    return F.pad(w, (0, -k % size)).reshape(n, -(-k // size), size)


def largest_integer(args: QuantArgs) -> int:
    """The largest q."""
    return 2 ** (args.bits - 1) - 1 if args.symmetric else 2**args.bits - 1


def stored_scale(scale: torch.Tensor, args: QuantArgs, where: str) -> torch.Tensor:
    """Scales of either sign in the type they are stored in, and never zero.

    Raises:
        ValueError: too large for it.
    """
    half = args.scale_dtype == "float16"
    magnitude = scale.abs().clamp_min(_MIN_HALF_SCALE if half else _MIN_SCALE)
    signed = torch.where(scale < 0, -magnitude, magnitude)
    if not half:
        return signed
    if not torch.isfinite(signed.half()).all():
        hint = 'use scale_dtype="float32"'
        raise ValueError(message(where, "weight", f"a scale of {float(magnitude.max()):.3g}", "at most 65504", hint))
    return signed.half()
