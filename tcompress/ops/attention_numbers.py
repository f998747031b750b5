"""The numbers that quantized attention is made of: constants and small functions that define them bit for bit.

Scores are counted in *ticks* of 2^-11 in the exponent of 2: a key whose score is 2048 ticks higher weighs twice as much.
In this unit the softmax is integer arithmetic of 16 bits, the same on every processor.
"""

from __future__ import annotations

import math

import torch

from tcompress.ops.quantize_per_token import quantize

#: Keys are taken in blocks of this many, counted from the first key; each block has a maximum of its own.
BLOCK = 64
TICKS = 2048
#: Of a natural exponent: e^x = 2^(x·log2 e).
TICKS_PER_NAT = TICKS * math.log2(math.e)
#: A weight of 1, the largest key of a block, as an integer.
ONE = 8192
#: Scale of a value token relative to the largest of its block, as an integer.
VALUE_ONE = 32767
#: What an empty row has for a maximum, so that -inf is subtracted from a number.
LOWEST = -3.0e38
#: A finite mask entry is at least this, so that adding it to a score does not make the key invisible.
LOWEST_MASK = -1.0e38
BITS = (8, 12)

#: 2^x - 1 on [0, 1) in units of 2^-14: x(c1 + x(c2 + x c3)), largest error 2.8 units, found by search over integers.
EXP2_INTEGER = (11399, 3696, 1287)
#: 2^x - 1 on [-0.5, 0.5]: x(c1 + …); relative error of 2^x below 2e-7.
EXP2_FLOAT = (0.693147004, 0.24022238, 0.0555067807, 0.00967172813, 0.0013284703)


def _float32(value: float, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def ticks_scale(scale: float) -> float:
    """The factor from q·k to ticks: what every backend rounds to float32."""
    return abs(scale) * TICKS_PER_NAT


def multiply_high(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(a·b + 2^14) >> 15: the rounded product of 16-bit fractions, one instruction on x86 and ARM."""
    return (a * b + 0x4000) >> 15


def exp2_integer(ticks: torch.Tensor) -> torch.Tensor:
    """`round(ONE · 2^(ticks/TICKS))` within a few units, for int32 ticks in [-32768, 0]."""
    c1, c2, c3 = EXP2_INTEGER
    x = (ticks & (TICKS - 1)) << 4
    mantissa = 16384 + multiply_high(x, multiply_high(x, multiply_high(x, torch.full_like(x, c3)) + c2) + c1)
    whole = ticks >> 11  # -16 … 0
    power = torch.where(whole >= -14, 1 << (14 + whole).clamp_min(0), 0)
    return multiply_high(mantissa, power)


def exp2_float(ticks: torch.Tensor) -> torch.Tensor:
    """2^(ticks/TICKS) for float32 ticks <= 0, in products and sums that round alike everywhere."""
    y = (ticks * (1 / TICKS)).clamp_min(-126.0)
    n = torch.round(y)
    x = y - n
    p = torch.zeros_like(x)
    for c in reversed(EXP2_FLOAT):
        p = (p + c) * x
    # The power from its bits: torch.ldexp multiplies by a pow() that may be off by an ulp.
    power = ((n.nan_to_num(0.0).int() + 127) << 23).view(torch.float32)
    return (p + 1.0) * power  # a NaN is in p


def soften(ticks: torch.Tensor, softcap: float) -> torch.Tensor:
    """softcap · tanh(s / softcap) on scores in ticks."""
    cap, factor = _float32(softcap * TICKS_PER_NAT, ticks), _float32(-2.0 / softcap, ticks)
    e = exp2_float(ticks.abs() * factor)  # e^(-2|s|/softcap)
    magnitude = (1.0 - e) / (1.0 + e) * cap
    return torch.where(ticks < 0, -magnitude, magnitude)


def mask_ticks(mask: torch.Tensor) -> torch.Tensor:
    """An additive mask in ticks; -inf stays, anything finite stays finite."""
    added = (mask.float() * _float32(TICKS_PER_NAT, mask)).clamp_min(LOWEST_MASK)
    return torch.where(mask == -math.inf, -math.inf, added)


def key_mean(k: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of float32 k [..., S, D] -> [..., D], summed in the order of the tokens within blocks of 64,
    then in that of the blocks. A channel whose mean is not finite has 0."""
    s = k.shape[-2]
    total = k.new_zeros((*k.shape[:-2], k.shape[-1]))
    if s == 0:
        return total
    padded = torch.nn.functional.pad(k, (0, 0, 0, -s % BLOCK)).unflatten(-2, (-1, BLOCK))
    sums = torch.zeros_like(padded[..., 0, :])
    for i in range(BLOCK):
        sums = sums + padded[..., i, :]
    for b in range(sums.shape[-2]):
        total = total + sums[..., b, :]
    mean = total * (torch.ones((), dtype=torch.float32, device=k.device) / s)
    return torch.where(torch.isfinite(mean), mean, 0.0)


def quantize_tokens(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers of each token as `quantize_per_token` defines them, of up to 12 bits.

    x [..., S, D] float32 -> integers as float32, [..., S, D]; scale [..., S], NaN for a token that is not finite.
    """
    q, scale, _ = quantize(x, bits, True)
    return q, scale.squeeze(-1)


def value_weights(scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The scales of a block's value tokens [..., BLOCK] relative to their largest: int32 up to VALUE_ONE; and it,
    [..., 1]. A token without finite scale counts as 0."""
    finite = torch.where(torch.isfinite(scale), scale, 0.0)
    largest = finite.amax(-1, keepdim=True)
    # as tensors: torch computes number / tensor as number * (1 / tensor), which rounds twice
    step = torch.where(largest > 0, torch.full_like(largest, VALUE_ONE) / largest, 0.0)
    return torch.round(finite * step).int(), largest
