"""Linear layer with an int8 weight of which most is zero, activations quantized per token on the way in."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import quantize_per_token as per_token
from tcompress.ops._registry import Op, define
from tcompress.ops.int8_linear import MAX_K, check_residual
from tcompress.ops.int8_linear import reference as dense_reference
from tcompress.ops.sparse_linear import check_operands
from tcompress.ops.sparse_prepack import why_not_on_cpu
from tcompress.ops.sparse_unpack import reference as unpack


def int8_sparse_linear(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: str = "1x4",
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`int8_linear` with a weight whose zeros are neither stored nor multiplied; the same numbers, bit for bit.

    Inference only: backward raises.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        kernel_weight: the result of `sparse_prepack(weight, layout)` of an int8 weight [N, K].
        weight_scale: [N] float32.
        bias: [N], any float type, or None.
        layout: "1x4", "8x4" or "2:4". With the last, asymmetric activations on x86 alone are multiplied without the
            zeros; otherwise the weight is unpacked at each call, which is slower than `int8_linear`. Or one of a
            GPU's.
        act_bits, act_symmetric, activation, out_dtype, residual: as in `int8_linear`; `out_dtype=torch.int32` gives
            the sums.

    Returns:
        [..., N].

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown layout or activation, too many bits,
            K > 65536.
    """
    op = "int8_sparse_linear"
    if weight_scale.dtype != torch.float32:
        raise TypeError(message(op, "weight_scale", weight_scale.dtype, "float32"))
    if weight_scale.dim() != 1:
        raise ValueError(message(op, "weight_scale", list(weight_scale.shape), "[N]"))
    n = weight_scale.shape[0]
    check_operands(op, x, kernel_weight, n, bias, torch.int8, layout, activation)
    if x.shape[-1] > MAX_K:
        hint = "a longer sum could leave int32"
        raise ValueError(message(op, "K", x.shape[-1], f"at most {MAX_K}", hint))
    per_token.check_bits(act_bits, 8 if act_symmetric else 7, op, "act_bits")
    if out_dtype is not None and out_dtype not in (*per_token.FLOAT_DTYPES, torch.int32):
        raise TypeError(message(op, "out_dtype", out_dtype, "float32, bfloat16, float16 or int32"))
    check_residual(op, residual, x, n, out_dtype)
    return backend.call(
        op, x, kernel_weight, weight_scale, bias, layout, act_bits, act_symmetric, activation, out_dtype, residual
    )


def reference(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    layout: str,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    weight = unpack(kernel_weight, weight_scale.shape[0], x.shape[-1], torch.int8, layout)
    return dense_reference(
        x, weight, weight_scale, bias, None, act_bits, act_symmetric, activation, out_dtype, residual
    )


def fake(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    layout: str,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=out_dtype or x.dtype)


def flops(x: torch.Tensor, kernel_weight: torch.Tensor, *args: object) -> int:
    return 2 * (x.numel() // max(x.shape[-1], 1)) * kernel_weight.nbytes


def nbytes(x: torch.Tensor, kernel_weight: torch.Tensor, weight_scale: torch.Tensor, *args: object) -> int:
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        kernel_weight.nbytes + 8 * weight_scale.numel() + (x.numel() + rows * weight_scale.numel()) * x.element_size()
    )


define(
    Op(
        name="int8_sparse_linear",
        schema=(
            "(Tensor x, Tensor kernel_weight, Tensor weight_scale, Tensor? bias, str layout, int act_bits,"
            " bool act_symmetric, str activation, ScalarType? out_dtype, Tensor? residual=None) -> Tensor"
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
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: str = "1x4",
    *args: object,
    **kwargs: object,
) -> str | None:
    return why_not_on_cpu(x, layout)


backend.register_kernel("int8_sparse_linear", "cpu", unsupported=cpu_unsupported)
