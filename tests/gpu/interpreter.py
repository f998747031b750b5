"""Triton's interpreter, made right for bfloat16: as it is, it multiplies the bits of bfloat16 as integers, and rounds
down.

Import before the kernels; it needs TRITON_INTERPRET=1 to be set before triton is first imported.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

_Builder = interpreter.InterpreterBuilder
_Handle = interpreter.TensorHandle
_dot, _cast = _Builder.create_dot, _Builder.cast_impl


def _widen(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _narrow(x: np.ndarray) -> np.ndarray:
    """Half to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _create_dot(self: Any, a: Any, b: Any, d: Any, *args: Any) -> Any:
    if a.dtype.scalar == tl.bfloat16:
        a, b = _Handle(_widen(a.data), tl.float32), _Handle(_widen(b.data), tl.float32)
    return _dot(self, a, b, d, *args)


def _cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
    before, after = src.dtype.scalar, dst_type.scalar
    if before != after and after == tl.bfloat16:
        return _Handle(_narrow(src.data.astype(np.float32)), after)
    if before != after and before == tl.bfloat16:
        return _cast(self, _Handle(_widen(src.data), tl.float32), dst_type)
    return _cast(self, src, dst_type)


_Builder.create_dot = _create_dot
_Builder.cast_impl = _cast_impl
_Builder.create_fp_to_fp = lambda self, src, dst, mode: _cast_impl(self, src, dst)
