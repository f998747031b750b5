"""Triton's interpreter, made right for bfloat16: as it is, it multiplies the bits of bfloat16 as integers, and rounds
down. And made faster: as it is, each call of a device function puts the interpreter's functions in the place of all of
`triton.language`'s again, a quarter of the time; here the first one of a launch does. Numpy's types are found once. Of
integers that wrap it computes whether they do, and keeps it to itself; here that is told.

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


_patch_lang, _run_grid = interpreter._patch_lang, interpreter.GridExecutor.__call__
#: Modules of triton.language whose functions are replaced while the launch at hand runs.
_patched: set[frozenset[int]] = set()


def _patch_lang_once(fn: Any) -> Any:
    languages = frozenset(id(m) for m in fn.__globals__.values() if m is tl or m is tl.core)
    if languages in _patched:
        return interpreter._LangPatchScope()
    _patched.add(languages)
    return _patch_lang(fn)


def _run_grid_patched_once(self: Any, *args: Any, **kwargs: Any) -> None:
    # a launch puts back what it replaced
    _patched.clear()
    try:
        _run_grid(self, *args, **kwargs)
    finally:
        _patched.clear()


interpreter._patch_lang = _patch_lang_once
interpreter.GridExecutor.__call__ = _run_grid_patched_once


_get_np_dtype = interpreter._get_np_dtype
_np_dtypes: dict[str, np.dtype] = {}


def _np_dtype_once(tt_dtype: Any) -> np.dtype:
    element = tt_dtype.element_ty if isinstance(tt_dtype, tl.block_type) else tt_dtype
    if element.name not in _np_dtypes:
        _np_dtypes[element.name] = _get_np_dtype(element)
    return _np_dtypes[element.name]


interpreter._get_np_dtype = _np_dtype_once


def _no_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """Of +, -, · on integers below 64 bits."""
    element = lhs.type.scalar
    if element.int_bitwidth < 64:
        compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        exact = compute(lhs.handle.data, rhs.handle.data, dtype=np.int64)
        if exact.size and not element.get_int_min_value() <= exact.min() <= exact.max() <= element.get_int_max_value():
            raise OverflowError(f"{operation.__name__} of {element}: {exact.min()} to {exact.max()}")


type(interpreter.interpreter_semantic).binary_op_sanitize_overflow_impl = _no_overflow
