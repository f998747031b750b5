"""Arithmetic of floats as the ISA defines it: one rounding, subnormals kept or flushed (.ftz), NaN and -0 in min, max.

Which bits a NaN has is not modelled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from .types import Array

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
_EXPONENT, _SIGN = np.uint32(0x7F800000), np.uint32(0x80000000)
_HALF_OF_F32 = np.uint64(0x10000000)
_BELOW_F32 = np.uint64(0x1FFFFFFF)
_SMALLEST_NORMAL = 2.0**-126


def flush(x: F32) -> F32:
    """Subnormals to zero of the same sign."""
    bits = np.atleast_1d(x).view(np.uint32)
    small = (bits & _EXPONENT) == 0
    return np.where(small, bits & _SIGN, bits).view(np.float32) if small.any() else x


def round_to_odd_sum(a: F64, b: F64) -> F64:
    """a + b, where it is not exact the neighbour whose last bit is 1: rounding that to half as many bits rounds once.
    (Boldo & Melquiond, IEEE Trans. Computers 57(4), 2008.)"""
    s = a + b
    part = s - a
    error = (a - (s - part)) + (b - part)
    bits = np.atleast_1d(s).view(np.int64)
    inexact = (error != 0) & np.isfinite(s) & (bits & 1 == 0)
    away = (error > 0) == (s > 0)
    return np.where(inexact, bits + np.where(away, 1, -1), bits).view(np.float64)


def fma_f32(a: F32, b: F32, c: F32) -> F32:
    """a · b + c, rounded once. The product is exact in float64; the sum there is rounded too, which matters only where
    it comes to lie between two float32, or is subnormal."""
    product, wide = a.astype(np.float64) * b, c.astype(np.float64)
    s = np.atleast_1d(product + wide)
    doubtful = ((s.view(np.uint64) & _BELOW_F32) == _HALF_OF_F32) | (np.abs(s) < _SMALLEST_NORMAL)
    if doubtful.any():
        s = round_to_odd_sum(*np.broadcast_arrays(product, wide))
    return s.astype(np.float32)


def fma_f32_directed(rounding: str) -> Callable[[F32, F32, F32], F32]:
    """As `fma_f32`, rounded down (rm), up (rp) or towards zero (rz)."""

    def compute(a: F32, b: F32, c: F32) -> F32:
        product = a.astype(np.float64) * b
        exact = round_to_odd_sum(*np.broadcast_arrays(product, c.astype(np.float64)))
        near = exact.astype(np.float32)
        # `exact` lies on the same side of every float32 as the sum itself
        above, below = near > exact, near < exact
        down, up = np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))
        if rounding == "rm":
            return np.where(above, down, near)
        if rounding == "rp":
            return np.where(below, up, near)
        return np.where(above & (exact > 0), down, np.where(below & (exact < 0), up, near))

    return compute


def fma_f16(a: Array, b: Array, c: Array) -> Array:
    product = a.astype(np.float64) * b.astype(np.float64)
    return round_to_odd_sum(*np.broadcast_arrays(product, c.astype(np.float64))).astype(np.float16)


def widen_bf16(bits: Array) -> F32:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow_bf16(x: F32) -> NDArray[np.uint16]:
    """Half to even."""
    bits = np.atleast_1d(x).view(np.uint32)
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def narrow_bf16_from_f64(x: F64) -> NDArray[np.uint16]:
    """Once: to float32 with round to odd, which has enough bits more."""
    near = x.astype(np.float32)
    error = x - near
    bits = np.atleast_1d(near).view(np.int32)
    fix = (error != 0) & np.isfinite(near) & (bits & 1 == 0)
    away = (error > 0) == (near > 0)
    return narrow_bf16(np.where(fix, bits + np.where(away, 1, -1), bits).astype(np.int32).view(np.float32))


def minimum(a: Array, b: Array, nan: bool) -> Array:
    """Of floats; -0 < +0; a NaN is passed over, or wins with .NaN."""
    smaller = np.where((a < b) | ((a == b) & np.signbit(a)), a, b)
    return _with_nan(smaller, a, b, nan)


def maximum(a: Array, b: Array, nan: bool) -> Array:
    larger = np.where((a > b) | ((a == b) & ~np.signbit(a)), a, b)
    return _with_nan(larger, a, b, nan)


def _with_nan(chosen: Array, a: Array, b: Array, nan: bool) -> Array:
    a_nan, b_nan = np.isnan(a), np.isnan(b)
    if nan:
        quiet = a.dtype.type(np.nan)
        return np.where(a_nan | b_nan, quiet, chosen)
    return np.where(a_nan, b, np.where(b_nan, a, chosen))


def to_integer(x: Array, rounding: str, dtype: np.dtype) -> Array:
    """Float to integer: out of range gives the nearest bound; NaN gives 0, or the top bit alone in 64 bits or from
    float64 (ISA, cvt)."""
    wide = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding](x.astype(np.float64))
    info = np.iinfo(dtype)
    # of 64 bits the highest integer is no float64; the one after it is, and is out of range
    low, high = float(info.min), float(info.max)
    nan = np.isnan(wide)
    inside = np.where(nan | (wide < low) | (wide >= high), 0, wide).astype(dtype)
    out = np.where(wide < low, dtype.type(info.min), np.where(wide >= high, dtype.type(info.max), inside))
    if nan.any() and (info.bits == 64 or x.dtype.itemsize == 8):
        top = np.array(1 << info.bits - 1, f"u{dtype.itemsize}").view(dtype)
        out = np.where(nan, top, out)
    return out.astype(dtype)
