"""Rounding and scales: device functions that follow `quantize_per_token` bit for bit.

A kernel that calls these is launched with `enable_fp_fusion=False`: a product fused into the sum after it is rounded
once where the definition rounds twice, and the integer of a tie would differ.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl

from .tiles import AMD

#: A row's range is taken as at least this; the same as in `tcompress.ops.quantize_per_token`.
MIN_RANGE = 2.0**-100
#: 1.5 · 2^23: a float32 of this size has no fraction, so adding it rounds, half to even; and it is the bias that makes
#: the bits of an integer below 2^22 those of a float (`biased_float`).
BIAS = tl.constexpr(12582912.0)
BIAS_BITS = tl.constexpr(0x4B400000)


def steps(bits: int, symmetric: bool) -> tuple[int, float, float]:
    """(q_max, 1 / q_max, smallest scale), the fractions as float32 rounds them."""
    q_max = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    step = np.float32(1) / np.float32(q_max)  # not a tensor: whatever torch's mode or device is, nothing waits for it
    return q_max, float(step), float(np.float32(MIN_RANGE) * step)


def capability(x: torch.Tensor) -> int:
    """Compute capability of the tensor's GPU, 90 for 9.0; 80 in Triton's interpreter; `tiles.AMD` on AMD's, whose own
    numbers (94 for gfx942) mean something else."""
    if not x.is_cuda:
        return 80
    if torch.version.hip:
        return AMD
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


@triton.jit
def round_half_even(x):
    """For |x| < 2^22."""
    return (x + BIAS) - BIAS


@triton.jit
def finite(x):
    """Whether neither NaN nor infinite."""
    return tl.abs(x) < float("inf")


@triton.jit
def all_finite(x, axis: tl.constexpr):
    return tl.min(finite(x).to(tl.int32), axis) != 0


@triton.jit
def reciprocal(scale):
    """1 / scale, rounded correctly; Triton's `/` is off by up to two units."""
    return tl.math.div_rn(1.0, scale)


@triton.jit
def clamp(x, low, high):
    return tl.minimum(tl.maximum(x, low), high)


@triton.jit
def biased_float(x):
    """int32 below 2^22 in magnitude -> float32 BIAS + x, exact: one integer addition. The conversion proper
    runs on the unit of exp2 on 8.x, which is the scarce one in attention, and at half rate on 9.0."""
    return (x + BIAS_BITS).to(tl.float32, bitcast=True)


@triton.jit
def split_12_bits(x):
    """Integers of 12 bits, as int32, in two bytes each: x = 32 · high + low, |high| <= 64, -16 <= low <= 15."""
    high = (x + 16) >> 5
    return high.to(tl.int8), (x - (high << 5)).to(tl.int8)


@triton.jit
def dot_12_bits(a, a_low, b, b_low):
    """Sums over up to 256 products of integers so split, int32, exact: |sum| <= 2047² · 256 < 2^30. Four products of
    bytes into one accumulator, which grows by 32 between them."""
    x = tl.dot(a, b, out_dtype=tl.int32) * 32
    x = tl.dot(a, b_low, acc=x, out_dtype=tl.int32)
    x = tl.dot(a_low, b, acc=x, out_dtype=tl.int32) * 32
    return tl.dot(a_low, b_low, acc=x, out_dtype=tl.int32)
