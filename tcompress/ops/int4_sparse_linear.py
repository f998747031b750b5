"""Linear layer with a 4-bit weight of which most is zero, activations quantized per token on the way in."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import quantize_per_token as per_token
from tcompress.ops._registry import Op, define
from tcompress.ops.int4_linear import SYMMETRIC_ZERO
from tcompress.ops.int4_linear import reference as dense_reference
from tcompress.ops.int4_sparse_prepack import CPU_LAYOUT, why_not_on_cpu
from tcompress.ops.int4_sparse_unpack import check_kernel_weight
from tcompress.ops.int4_sparse_unpack import reference as unpack
from tcompress.ops.int8_linear import check_activation, check_bias, check_residual
from tcompress.packing.int4 import join_nibbles


def int4_sparse_linear(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    group_size: int = 128,
    scale_dtype: torch.dtype = torch.float16,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    layout: str = CPU_LAYOUT,
) -> torch.Tensor:
    """`int4_linear` without zero points, with a weight whose blocks of zeros are neither stored nor multiplied.

    The same integers: exact sums in int32 within a group, each multiplied by its scale in float32. Inference only:
    backward raises.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        kernel_weight: the result of `int4_sparse_prepack` of a weight [N, K].
        out_features: N.
        bias: [N], any float type, or None.
        group_size: g, as the weight was packed.
        scale_dtype: type of the scales that it was packed with, float16 or float32.
        act_bits: bits of the activations: 2 to 8 symmetric, 2 to 7 asymmetric.
        act_symmetric, activation, out_dtype, residual: as in `int4_linear`.
        layout: in which the weight was packed.

    Returns:
        [..., N].

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown activation, too many bits, K > 65536.
    """
    op = "int4_sparse_linear"
    per_token.check_float(x, op, "x")
    check_kernel_weight(op, kernel_weight, out_features, x.shape[-1], group_size, scale_dtype, layout)
    check_bias(op, bias, out_features)
    per_token.check_bits(act_bits, 8 if act_symmetric else 7, op, "act_bits")
    check_activation(op, activation)
    if out_dtype is not None and out_dtype not in per_token.FLOAT_DTYPES:
        raise TypeError(message(op, "out_dtype", out_dtype, "float32, bfloat16 or float16"))
    check_residual(op, residual, x, out_features, out_dtype)
    return backend.call(
        op,
        x,
        kernel_weight,
        out_features,
        bias,
        group_size,
        scale_dtype,
        act_bits,
        act_symmetric,
        activation,
        out_dtype,
        residual,
        layout,
    )


def reference(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    group_size: int,
    scale_dtype: torch.dtype,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
    layout: str = CPU_LAYOUT,
) -> torch.Tensor:
    weight, scale = unpack(kernel_weight, out_features, x.shape[-1], group_size, scale_dtype, layout)
    nibbles = join_nibbles((weight + SYMMETRIC_ZERO).view(torch.uint8))
    return dense_reference(
        x, nibbles, scale, None, bias, None, group_size, act_bits, act_symmetric, activation, out_dtype, residual
    )


def fake(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    group_size: int,
    scale_dtype: torch.dtype,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
    layout: str = CPU_LAYOUT,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


def flops(x: torch.Tensor, kernel_weight: torch.Tensor, *args: object) -> int:
    return 4 * (x.numel() // max(x.shape[-1], 1)) * kernel_weight.nbytes


def nbytes(x: torch.Tensor, kernel_weight: torch.Tensor, out_features: int, *args: object) -> int:
    rows = x.numel() // max(x.shape[-1], 1)
    return kernel_weight.nbytes + (x.numel() + rows * out_features) * x.element_size()


define(
    Op(
        name="int4_sparse_linear",
        schema=(
            "(Tensor x, Tensor kernel_weight, int out_features, Tensor? bias, int group_size, ScalarType scale_dtype,"
            " int act_bits, bool act_symmetric, str activation, ScalarType? out_dtype, Tensor? residual=None,"
            ' str layout="8x4") -> Tensor'
        ),
        reference=reference,
        fake=fake,
        tolerance=4.0,  # as int4_linear
        flops=flops,
        nbytes=nbytes,
    )
)


def unsupported(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    group_size: int = 128,
    scale_dtype: torch.dtype = torch.float16,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    layout: str = CPU_LAYOUT,
) -> str | None:
    return why_not_on_cpu(x, layout)


backend.register_kernel("int4_sparse_linear", "cpu", unsupported=unsupported)
