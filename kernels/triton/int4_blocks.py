"""The step that all kernels with a 4-bit weight share: a tile of nibbles to integers, times activations, times scales.

    weight [N, ceil(K/2)] uint8      k0|k1 k2|k3 k4|k5 …      the even k in the low nibble (tcompress/packing/int4.py)
    scale, zero point [N, ceil(K/g)]                          one for g weights along K; no zero point: 8

 1. Bytes to low and high nibbles, joined along K: integers 0 … 15.
 2. Less the zero point: -15 … 15, which int8 and the 16-bit floats hold exactly.
 3. W4A8: int8 products, exact int32 sums of a whole group; then times the group's scale.
    W4A16: products in the type of x, float32 sums of a block, times the group's scale: the weight is never rounded.

A block of K lies within one group.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: The zero point of a weight that has none.
SYMMETRIC_ZERO = tl.constexpr(8)
#: Bits of the float16 number 1024, whose last place is 1: with a nibble in them they are those of 1024 + nibble.
HALF_1024 = tl.constexpr(0x6400)


@triton.jit
def load_nibbles(w_at, start, k, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr):
    """[BLOCK_N, BLOCK_K] int8, 0 … 15; `w_at` [BLOCK_N, 1] points to the rows."""
    byte = start // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    if WHOLE_K:
        packed = tl.load(w_at + byte)
    else:
        packed = tl.load(w_at + byte, mask=byte < (k + 1) // 2, other=0)
    return tl.interleave(packed & 15, packed >> 4).to(tl.int8)


@triton.jit
def load_group(SCALE, ZERO, at, HAS_ZERO: tl.constexpr):
    """Scale, float32, and zero point, int8, at the same places."""
    scale = tl.load(SCALE + at).to(tl.float32)
    if HAS_ZERO:
        zero = tl.load(ZERO + at).to(tl.int8)
    else:
        zero = tl.zeros_like(scale).to(tl.int8) + SYMMETRIC_ZERO
    return scale, zero.to(tl.int8)


@triton.jit
def centred_integers(nibbles, zero, start, k, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr):
    """nibble - zero point, int8; 0 from K on."""
    w = nibbles - zero[:, None]
    if not WHOLE_K:
        w = tl.where((start + tl.arange(0, BLOCK_K) < k)[None, :], w, 0)
    return w.to(tl.int8)


@triton.jit
def centred_floats(nibbles, zero, start, k, dtype: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE_K: tl.constexpr):
    """The same in a float type."""
    if dtype == tl.float16:
        # the conversion proper runs at an eighth of the rate of these
        biased = (nibbles.to(tl.int16) | HALF_1024).to(tl.float16, bitcast=True)
        w = biased - (zero.to(tl.float16) + 1024.0).to(tl.float16)[:, None]
        if not WHOLE_K:
            w = tl.where((start + tl.arange(0, BLOCK_K) < k)[None, :], w, 0.0)
        return w.to(tl.float16)
    else:
        return centred_integers(nibbles, zero, start, k, BLOCK_K, WHOLE_K).to(dtype)
