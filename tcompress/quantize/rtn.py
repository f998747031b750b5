"""Round to nearest: the quantization that needs no data."""

from __future__ import annotations

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


def round_to_nearest(weight: torch.Tensor, args: QuantArgs) -> PackedWeight:
    """Quantizes a weight by the range of what shares a scale: an output channel, or a group of it along K.

    ::

        symmetric:   scale = max|W| / (2^(bits-1) - 1),                q = round(W / scale)
        asymmetric:  scale = (max(W,0) - min(W,0)) / (2^bits - 1),     q = round(W / scale) + zero_point
                     zero_point = round(-min(W,0) / scale)

    Rounding is half to even; scales are rounded to the type they are stored in before the integers are found. Up to 4
    bits are stored in layout "int4", symmetric ones with 8 added; more in layout "dense".

    Args:
        weight: [N, K], any float type; computed in float32.
        args: of a `Scheme`'s weights.

    Raises:
        ValueError: the weight is not two-dimensional, holds NaN or infinity, or is too large for float16 scales.
    """
    if weight.dim() != 2:
        raise ValueError(message("round_to_nearest", "weight", list(weight.shape), "[N, K]"))
    w = weight.detach().float()
    bad = int((~torch.isfinite(w)).sum())
    if bad:
        hint = "a NaN or infinite weight has no integer; repair the checkpoint"
        raise ValueError(message("round_to_nearest", "weight", f"{bad} values NaN or infinite", "finite", hint))
    n, k = w.shape
    size = args.group_size or max(k, 1)
    groups = F.pad(w, (0, -k % size)).reshape(n, -(-k // size), size)
    q_max = 2 ** (args.bits - 1) - 1 if args.symmetric else 2**args.bits - 1
    lo, hi = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scale = _stored((torch.maximum(-lo, hi) if args.symmetric else hi / q_max - lo / q_max) / _divisor(args), args)
    rounded = torch.round(groups / scale.float()[..., None])
    if args.symmetric:
        q, zero_point = rounded.clamp(-q_max, q_max), None
    else:
        zero = torch.round(-lo / scale.float()).clamp(0, q_max)
        q, zero_point = (rounded + zero[..., None]).clamp(0, q_max), zero.to(torch.uint8)
    q = q.flatten(1)[:, :k]
    if args.bits > 4:
        # A weight without inputs still has a scale for each output.
        return PackedWeight(q.to(torch.int8), scale[:, 0] if k else scale.new_full((n,), _MIN_SCALE), (n, k))
    stored = q + SYMMETRIC_ZERO if args.symmetric else q
    return PackedWeight(pack_int4(stored.to(torch.uint8)), scale, (n, k), "int4", zero_point, size)


def _divisor(args: QuantArgs) -> int:
    return 2 ** (args.bits - 1) - 1 if args.symmetric else 1


def _stored(scale: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """In the type it is stored in, and never zero."""
    if args.scale_dtype == "float32":
        return scale.clamp_min(_MIN_SCALE)
    half = scale.clamp_min(_MIN_HALF_SCALE).half()
    if not torch.isfinite(half).all():
        hint = 'use scale_dtype="float32"'
        raise ValueError(
            message("round_to_nearest", "weight", f"a scale of {float(scale.max()):.3g}", "at most 65504", hint)
        )
    return half
