"""int8 linear layer whose result is quantized for a following one."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.ops import quantize_per_token as per_token
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_linear import check
from tcompress.ops.int8_linear import nbytes as nbytes_of_linear
from tcompress.ops.int8_linear import reference as linear

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def int8_linear_requantize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    kernel_weight: torch.Tensor | None = None,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_bits: int = 8,
    out_symmetric: bool = True,
) -> Quantized:
    """`quantize_per_token(int8_linear(x, …, out_dtype=float32), out_bits, out_symmetric)` in one call.

    A row is quantized while it is in the caches of the thread that computed it; the float result is never stored whole.
    `int8_linear_quantized` takes what this returns.

    Args:
        x, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric, activation: as in `int8_linear`.
        out_bits, out_symmetric: as in `quantize_per_token`.

    Returns:
        q [..., N] int8 (symmetric) or uint8, scale [..., 1] float32, zero_point [..., 1] int32.

    Raises:
        TypeError, ValueError: as `int8_linear` and `quantize_per_token`.
    """
    op = "int8_linear_requantize"
    check(op, x, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric, activation, None)
    per_token.check_bits(out_bits, 8, op, "out_bits")
    linear_arguments = (x, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric, activation)
    result: Quantized = backend.call(op, *linear_arguments, out_bits, out_symmetric)
    return result


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_bits: int,
    out_symmetric: bool,
) -> Quantized:
    arguments = (x, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric, activation)
    return per_token.reference(linear(*arguments, torch.float32), out_bits, out_symmetric)


def fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_bits: int,
    out_symmetric: bool,
) -> Quantized:
    y = x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=torch.float32)
    return per_token.fake(y, out_bits, out_symmetric)


def flops(x: torch.Tensor, weight: torch.Tensor | None, weight_scale: torch.Tensor, *args: object) -> int:
    return 2 * x.numel() * weight_scale.numel()


def nbytes(x: torch.Tensor, weight: torch.Tensor | None, weight_scale: torch.Tensor, *args: object) -> int:
    outputs = x.numel() // max(x.shape[-1], 1) * weight_scale.numel()
    return nbytes_of_linear(x, weight, weight_scale) - outputs * (x.element_size() - 1)


define(
    Op(
        name="int8_linear_requantize",
        schema=(
            "(Tensor x, Tensor? weight, Tensor weight_scale, Tensor? bias, Tensor? kernel_weight, int act_bits,"
            " bool act_symmetric, str activation, int out_bits, bool out_symmetric) -> (Tensor, Tensor, Tensor)"
        ),
        reference=reference,
        fake=fake,
        tolerance=4.0,  # of the floats that are quantized, as int8_linear
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int8_linear_requantize", "cpu", unsupported=cpu_unsupported)
