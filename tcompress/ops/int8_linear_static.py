"""Linear layer with an int8 weight and activations quantized on the way in by one scale that is fixed."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_linear import check, check_residual
from tcompress.ops.int8_linear import nbytes as nbytes_of_linear
from tcompress.ops.int8_linear_quantized import reference as product
from tcompress.ops.quantize_static import check_fixed
from tcompress.ops.quantize_static import reference as quantize


def int8_linear_static(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    kernel_weight: torch.Tensor | None = None,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`int8_linear_quantized(*quantize_static(x, input_scale, input_zero_point, act_bits, act_symmetric), weight, …)`
    in one call: a row is multiplied while its integers are in the cache.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        input_scale: float32, one number. input_zero_point: int32, one number; None if symmetric.
        weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric, activation, out_dtype, residual: as in
            `int8_linear`.

    Returns:
        [..., N].

    Raises:
        TypeError, ValueError: as `int8_linear` and `quantize_static`.
    """
    op = "int8_linear_static"
    check(op, x, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric, activation, out_dtype)
    check_fixed(op, x, input_scale, input_zero_point, act_symmetric, "input_")
    check_residual(op, residual, x, weight_scale.shape[0], out_dtype)
    weights = (weight, weight_scale, bias, kernel_weight)
    settings = (act_bits, act_symmetric, activation, out_dtype, residual)
    result: torch.Tensor = backend.call(op, x, input_scale, input_zero_point, *weights, *settings)
    return result


def reference(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    integers = quantize(x, input_scale, input_zero_point, act_bits, act_symmetric)
    dtype = out_dtype or x.dtype
    return product(*integers, weight, weight_scale, bias, kernel_weight, activation, dtype, residual)


def fake(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=out_dtype or x.dtype)


def flops(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    *args: object,
) -> int:
    return 2 * x.numel() * weight_scale.numel()


def nbytes(
    x: torch.Tensor,
    input_scale: torch.Tensor,
    input_zero_point: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    *args: object,
) -> int:
    return nbytes_of_linear(x, weight, weight_scale)


define(
    Op(
        name="int8_linear_static",
        schema=(
            "(Tensor x, Tensor input_scale, Tensor? input_zero_point, Tensor? weight, Tensor weight_scale,"
            " Tensor? bias, Tensor? kernel_weight, int act_bits, bool act_symmetric, str activation,"
            " ScalarType? out_dtype, Tensor? residual=None) -> Tensor"
        ),
        reference=reference,
        fake=fake,
        tolerance=4.0,  # as int8_linear
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int8_linear_static", "cpu", unsupported=cpu_unsupported)
