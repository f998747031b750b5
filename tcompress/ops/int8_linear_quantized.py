"""int8 linear layer over activations that are quantized already."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_linear import check, check_residual, finish, integer_matmul
from tcompress.ops.int8_unpack import reference as unpack


def int8_linear_quantized(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    kernel_weight: torch.Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`int8_linear` from what `quantize_per_token` or `int8_linear_requantize` returned.

    ::

        acc[m,n] = Σ_k (q[m,k] - zero_point[m]) · weight[n,k]                     exact, in int32
        y[m,n]   = activation(float32(acc) · scale[m] · weight_scale[n] + bias[n]) + residual[m,n]

    Args:
        q: [..., K] int8, symmetric, -127 … 127 (zero_point is then taken as 0); or uint8 of at most 7 bits, 0 … 127.
        scale: [..., 1] float32. zero_point: [..., 1] int32.
        weight, weight_scale, bias, kernel_weight, activation: as in `int8_linear`.
        out_dtype: float32, bfloat16, float16, or int32 for acc.
        residual: like the result in shape and type, or None.

    Returns:
        [..., N].

    Raises:
        TypeError, ValueError: as `int8_linear`; scales or zero points that do not fit q.
    """
    op = "int8_linear_quantized"
    if not isinstance(q, torch.Tensor) or q.dtype not in (torch.int8, torch.uint8):
        raise TypeError(message(op, "q", getattr(q, "dtype", type(q).__name__), "int8 or uint8"))
    if q.dim() == 0:
        raise ValueError(message(op, "q", "a 0-d tensor", "[..., K]"))
    for name, value, dtype in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.int32)):
        if value.dtype != dtype:
            raise TypeError(message(op, name, value.dtype, str(dtype).removeprefix("torch.")))
        if value.shape != (*q.shape[:-1], 1):
            raise ValueError(message(op, name, list(value.shape), [*q.shape[:-1], 1]))
    shape = q.new_empty((), dtype=torch.float32).expand(q.shape)  # the shape that check looks at
    check(op, shape, weight, weight_scale, bias, kernel_weight, 7, True, activation, out_dtype)
    check_residual(op, residual, shape, weight_scale.shape[0], out_dtype)
    arguments = (q, scale, zero_point, weight, weight_scale, bias, kernel_weight, activation, out_dtype, residual)
    result: torch.Tensor = backend.call(op, *arguments)
    return result


def reference(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    if weight is None:
        assert kernel_weight is not None
        weight = unpack(kernel_weight, weight_scale.shape[0], q.shape[-1], None)
    acc = integer_matmul(q, weight)
    if q.dtype == torch.uint8:
        acc -= zero_point * weight.sum(1, dtype=torch.int32)
    if out_dtype == torch.int32:
        return acc
    return finish(acc.float() * scale * weight_scale, bias, activation, residual, out_dtype)


def fake(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    activation: str,
    out_dtype: torch.dtype,
    residual: torch.Tensor | None,
) -> torch.Tensor:
    return q.new_empty((*q.shape[:-1], weight_scale.shape[0]), dtype=out_dtype)


def flops(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    *args: object,
) -> int:
    return 2 * q.numel() * weight_scale.numel()


def nbytes(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    *args: object,
) -> int:
    n = weight_scale.numel()
    return q.nbytes + scale.nbytes + zero_point.nbytes + n * (q.shape[-1] + 8) + scale.numel() * n * 4


define(
    Op(
        name="int8_linear_quantized",
        schema=(
            "(Tensor q, Tensor scale, Tensor zero_point, Tensor? weight, Tensor weight_scale, Tensor? bias,"
            " Tensor? kernel_weight, str activation, ScalarType out_dtype, Tensor? residual) -> Tensor"
        ),
        reference=reference,
        fake=fake,
        tolerance=4.0,  # as int8_linear
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int8_linear_quantized", "cpu", unsupported=cpu_unsupported)
