"""Quantization of activations by one scale that calibration data have fixed."""

from __future__ import annotations

import math

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.quantize_per_token import check_bits, check_float

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def quantize_static(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None = None, bits: int = 8, symmetric: bool = True
) -> Quantized:
    """Quantizes a tensor with a scale, and a zero point, that are known before.

    ::

        symmetric:   q = clamp(round(x / scale), -qmax, qmax)                qmax = 2^(bits-1) - 1
        asymmetric:  q = clamp(round(x / scale) + zero_point, 0, qmax)       qmax = 2^bits - 1

    so that `x ≈ (q - zero_point) * scale` for what lies in the range; the rest is clipped. Rounding is half to even,
    arithmetic in float32, and the division a product with 1 / scale. The result is the same on every backend and path,
    bit for bit, and has the form of `quantize_per_token`'s, for `int8_linear_quantized`. A row that holds NaN or
    infinity gives scale NaN, so that what is computed from it is NaN; so do all rows where the scale is no positive
    number.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        scale: float32, one number (`quantize.observers` finds it).
        zero_point: int32, one number; None if symmetric.
        bits: 2 to 8.
        symmetric: signed without zero point, or unsigned with one.

    Returns:
        q: [..., K], int8 if symmetric, else uint8.
        scale: [..., 1], float32. zero_point: [..., 1], int32; zeros if symmetric.

    Raises:
        TypeError: wrong types. ValueError: `x` has no axis, `bits` is out of range, more than one scale, or tensors on
            several devices.
    """
    op = "quantize_static"
    check_float(x, op, "x")
    check_bits(bits, 8, op, "bits")
    check_fixed(op, x, scale, zero_point, symmetric)
    result: Quantized = backend.call(op, x, scale, zero_point, bits, symmetric)
    return result


def check_fixed(
    op: str, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, symmetric: bool, prefix: str = ""
) -> None:
    """Raises unless scale and zero point fit; the message names `op`, and the arguments with a prefix."""
    if symmetric != (zero_point is None):
        expected = "None with symmetric integers, int32 with asymmetric ones"
        raise TypeError(message(op, f"{prefix}zero_point", "None" if zero_point is None else "a tensor", expected))
    for name, value, dtype in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.int32)):
        if value is None:
            continue
        if value.dtype != dtype:
            raise TypeError(message(op, prefix + name, value.dtype, str(dtype).removeprefix("torch.")))
        if value.numel() != 1:
            raise ValueError(message(op, prefix + name, list(value.shape), "one number"))
        if value.device != x.device:
            got = f"a tensor on {value.device}"
            raise ValueError(message(op, prefix + name, got, f"one on {x.device}, where x is"))


def reference(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, symmetric: bool
) -> Quantized:
    x = x.float().contiguous()
    q_max = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    inverse = 1 / scale.reshape(())
    usable = (scale.reshape(()) > 0) & torch.isfinite(scale.reshape(())) & torch.isfinite(inverse)
    ok = torch.isfinite(x).all(-1, keepdim=True) & usable
    zero = torch.zeros_like(ok, dtype=torch.int32)
    if zero_point is not None and not symmetric:
        zero = torch.where(ok, zero_point.reshape(()), 0)
    q = torch.round(torch.where(ok, x, 0) * torch.where(usable, inverse, 0)) + zero
    q = q.clamp(-q_max if symmetric else 0, q_max)
    return q.to(torch.int8 if symmetric else torch.uint8), torch.where(ok, scale.reshape(()), math.nan), zero


def fake(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, symmetric: bool
) -> Quantized:
    column = (*x.shape[:-1], 1)
    return (
        x.new_empty(x.shape, dtype=torch.int8 if symmetric else torch.uint8),
        x.new_empty(column, dtype=torch.float32),
        x.new_empty(column, dtype=torch.int32),
    )


def flops(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, symmetric: bool) -> int:
    return 3 * x.numel()  # scaling, rounding, clamping


def nbytes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, bits: int, symmetric: bool) -> int:
    rows = x.numel() // max(x.shape[-1], 1)
    return x.numel() * (x.element_size() + 1) + 8 * rows


define(
    Op(
        name="quantize_static",
        schema=("(Tensor x, Tensor scale, Tensor? zero_point, int bits, bool symmetric) -> (Tensor, Tensor, Tensor)"),
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("quantize_static", "cpu", unsupported=cpu_unsupported)
