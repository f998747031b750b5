"""Dynamic quantization of activations, one scale a token."""

from __future__ import annotations

import math

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define

#: A row's range is taken as at least this, so that an all-zero row needs no special case.
MIN_RANGE = 2.0**-100
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def quantize_per_token(
    x: torch.Tensor, bits: int = 8, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantizes every token (the last axis) with a scale of its own.

    Symmetric, with `qmax = 2^(bits-1) - 1`::

        scale = max|x| / qmax
        q     = clamp(round(x / scale), -qmax, qmax)

    Asymmetric, with `qmax = 2^bits - 1` and a range that always includes 0::

        scale      = (max(x, 0) - min(x, 0)) / qmax
        zero_point = round(-min(x, 0) / scale)
        q          = clamp(round(x / scale) + zero_point, 0, qmax)

    so that `x ≈ (q - zero_point) * scale`. Rounding is half to even, arithmetic in float32. The result is the same on
    every backend and path, bit for bit. An all-zero row gives zeros; a row that holds NaN or infinity gives scale NaN,
    so that what is computed from it is NaN.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        bits: 2 to 8.
        symmetric: signed without zero point, or unsigned with one.

    Returns:
        q: [..., K], int8 if symmetric, else uint8.
        scale: [..., 1], float32.
        zero_point: [..., 1], int32; zeros if symmetric.

    Raises:
        TypeError: `x` is not a float tensor. ValueError: `x` has no axis, or `bits` is out of range.
    """
    check_float(x, "quantize_per_token", "x")
    check_bits(bits, 8, "quantize_per_token", "bits")
    return backend.call("quantize_per_token", x, bits, symmetric)


def check_float(x: torch.Tensor, op: str, argument: str) -> None:
    if not isinstance(x, torch.Tensor):
        raise TypeError(message(op, argument, type(x).__name__, "a tensor"))
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(message(op, argument, x.dtype, "float32, bfloat16 or float16"))
    if x.dim() == 0:
        raise ValueError(message(op, argument, "a 0-d tensor", "[..., K]"))


def check_bits(bits: int, highest: int, op: str, argument: str) -> None:
    if not 2 <= bits <= highest:
        raise ValueError(message(op, argument, bits, f"2 to {highest}"))


def reference(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, scale, zero_point = quantize(x, bits, symmetric)
    return q.to(torch.int8 if symmetric else torch.uint8), scale, zero_point.int()


def quantize(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The definition, for any number of bits below 24; integers as float32."""
    x = x.float().contiguous()  # the results are contiguous, as `fake` says
    q_max = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    zero = x.new_zeros((*x.shape[:-1], 1))
    if x.shape[-1] == 0:
        lo = hi = zero
    else:
        lo, hi = x.amin(-1, keepdim=True).clamp_max(0), x.amax(-1, keepdim=True).clamp_min(0)
    # Division is written as multiplication by a float32 reciprocal, which rounds alike on every device.
    step = torch.ones_like(zero) / q_max
    scale = torch.maximum(-lo, hi) * step if symmetric else hi * step - lo * step
    scale = torch.maximum(scale, MIN_RANGE * step)
    finite = torch.isfinite(x).all(-1, keepdim=True)
    scale = torch.where(finite, scale, math.nan)
    inverse = torch.where(finite, 1 / scale, 0)
    zero_point = zero if symmetric else torch.where(finite, torch.round(-lo * inverse), 0)
    q = torch.round(torch.where(finite, x, 0) * inverse) + zero_point
    return q.clamp(-q_max if symmetric else 0, q_max), scale, zero_point


def fake(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    column = (*x.shape[:-1], 1)
    return (
        x.new_empty(x.shape, dtype=torch.int8 if symmetric else torch.uint8),
        x.new_empty(column, dtype=torch.float32),
        x.new_empty(column, dtype=torch.int32),
    )


def flops(x: torch.Tensor, bits: int, symmetric: bool) -> int:
    return 5 * x.numel()  # minimum, maximum, scaling, rounding, clamping


def nbytes(x: torch.Tensor, bits: int, symmetric: bool) -> int:
    rows = x.numel() // max(x.shape[-1], 1)
    return x.numel() * (x.element_size() + 1) + 8 * rows


define(
    Op(
        name="quantize_per_token",
        schema="(Tensor x, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)",
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("quantize_per_token", "cpu", unsupported=cpu_unsupported)
