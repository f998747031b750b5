"""Round to nearest: the quantization that needs no data."""

from __future__ import annotations

import torch

from tcompress.errors import message
from tcompress.packing import PackedWeight
from tcompress.quantize.scheme import QuantArgs

#: Scales are at least this, so that an all-zero channel needs no special case.
_MIN_SCALE = 2.0**-100


def round_to_nearest(weight: torch.Tensor, args: QuantArgs) -> PackedWeight:
    """Quantizes each output channel of a weight by its largest magnitude.

    ::

        scale[n]    = max_k |W[n,k]| / (2^(bits-1) - 1)
        qdata[n,k]  = round(W[n,k] / scale[n])            half to even

    Args:
        weight: [N, K], any float type; computed in float32.
        args: symmetric, per channel.

    Raises:
        ValueError: the weight is not two-dimensional, or holds NaN or infinity.
    """
    if weight.dim() != 2:
        raise ValueError(message("round_to_nearest", "weight", list(weight.shape), "[N, K]"))
    w = weight.detach().float()
    bad = int((~torch.isfinite(w)).sum())
    if bad:
        hint = "a NaN or infinite weight has no integer; repair the checkpoint"
        raise ValueError(message("round_to_nearest", "weight", f"{bad} values NaN or infinite", "finite", hint))
    q_max = 2 ** (args.bits - 1) - 1
    amax = w.abs().amax(1) if w.shape[1] else w.new_zeros(w.shape[0])
    scale = (amax / q_max).clamp_min(_MIN_SCALE)
    qdata = torch.round(w / scale[:, None]).clamp(-q_max, q_max).to(torch.int8)
    return PackedWeight(qdata, scale, (w.shape[0], w.shape[1]))
