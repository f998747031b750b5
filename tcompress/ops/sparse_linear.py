"""Linear layer with a float weight of which most is zero."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import quantize_per_token as per_token
from tcompress.ops._registry import Op, define
from tcompress.ops.int8_linear import check_activation, check_bias, check_residual, finish
from tcompress.ops.sparse_prepack import float_type, why_not_on_cpu
from tcompress.ops.sparse_unpack import check_kernel_weight
from tcompress.ops.sparse_unpack import reference as unpack


def sparse_linear(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    layout: str = "unstructured",
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`activation(x Wᵀ + bias) + residual` in float32, with a weight whose zeros are neither stored nor multiplied.

    A token that holds NaN or infinity gives a row of NaN: what a zero of the weight would make of it is not asked.
    Inference only: backward raises.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        kernel_weight: the result of `sparse_prepack(weight, layout)` of a float weight [N, K].
        out_features: N.
        bias: [N], any float type, or None.
        layout: "unstructured" or "8x4"; or one of a GPU's, whose kernels multiply in 16-bit floats where weight and
            `x` have the same type, and add up in float32.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        out_dtype: type of the result, by default that of `x`.
        residual: like the result in shape and type, added last; or None.

    Returns:
        [..., N].

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown layout or activation.
    """
    op = "sparse_linear"
    check_operands(op, x, kernel_weight, out_features, bias, float_type(layout), layout, activation)
    if out_dtype is not None and out_dtype not in per_token.FLOAT_DTYPES:
        raise TypeError(message(op, "out_dtype", out_dtype, "float32, bfloat16 or float16"))
    check_residual(op, residual, x, out_features, out_dtype)
    return backend.call(op, x, kernel_weight, out_features, bias, layout, activation, out_dtype, residual)


def check_operands(
    op: str,
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    n: int,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    layout: str,
    activation: str,
) -> None:
    """Raises unless the arguments of a sparse layer fit together; `dtype` is the weight's."""
    per_token.check_float(x, op, "x")
    check_kernel_weight(op, kernel_weight, n, x.shape[-1], dtype, layout)
    check_bias(op, bias, n)
    check_activation(op, activation)


def reference(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    layout: str,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    weight = unpack(kernel_weight, out_features, x.shape[-1], float_type(layout), layout).float()
    rows = x.float()
    whole = rows.isfinite().all(-1, keepdim=True)
    y = (rows @ weight.t()).masked_fill(~whole, torch.nan)
    return finish(y, bias, activation, residual, out_dtype or x.dtype)


def fake(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None,
    layout: str,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype or x.dtype)


def flops(x: torch.Tensor, kernel_weight: torch.Tensor, out_features: int, *args: object) -> int:
    return 2 * (x.numel() // max(x.shape[-1], 1)) * (kernel_weight.nbytes // 4)


def nbytes(x: torch.Tensor, kernel_weight: torch.Tensor, out_features: int, *args: object) -> int:
    rows = x.numel() // max(x.shape[-1], 1)
    return kernel_weight.nbytes + (x.numel() + rows * out_features) * x.element_size()


define(
    Op(
        name="sparse_linear",
        schema=(
            "(Tensor x, Tensor kernel_weight, int out_features, Tensor? bias, str layout, str activation,"
            " ScalarType? out_dtype, Tensor? residual=None) -> Tensor"
        ),
        reference=reference,
        fake=fake,
        tolerance=4.0,  # as int8_linear
        flops=flops,
        nbytes=nbytes,
    )
)


def cpu_unsupported(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: torch.Tensor | None = None,
    layout: str = "unstructured",
    *args: object,
    **kwargs: object,
) -> str | None:
    return why_not_on_cpu(x, layout)


backend.register_kernel("sparse_linear", "cpu", unsupported=cpu_unsupported)
