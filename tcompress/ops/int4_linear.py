"""Linear layer with a 4-bit weight in groups, activations quantized per token or left in floating point."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import quantize_per_token as per_token
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int4_prepack import check_kernel_weight, check_weight, why_not_the_cpu_layout
from tcompress.ops.int4_unpack import reference as unpack
from tcompress.ops.int8_linear import check_activation, check_bias, check_residual, finish
from tcompress.packing.int4 import unpack_int4

SYMMETRIC_ZERO = 8


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    kernel_weight: torch.Tensor | None = None,
    group_size: int = 128,
    act_bits: int | None = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """`activation(x Wᵀ + bias) + residual` with 4-bit weights, one scale (and zero point) for g of them along K.

    ::

        W[n,k]     = (weight[n,k] - zero_point[n,k/g]) · weight_scale[n,k/g]
        a, s, z    = quantize_per_token(x, act_bits, act_symmetric)
        acc[m,n,i] = Σ_{k in group i} (a[m,k] - z[m]) · (weight[n,k] - zero_point[n,i])         exact, in int32
        y[m,n]     = activation(s[m] · Σ_i float32(acc[m,n,i]) · weight_scale[n,i] + bias[n]) + residual[m,n]

    With `act_bits=None` (weight-only, W4A16 and W4A32) x takes the place of a, in float32, and s is 1. A token that
    holds NaN or infinity gives, with quantized activations, a row of NaN. Inference only: backward raises.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weight: [N, ceil(K/2)] uint8, from `packing.pack_int4`; None where kernel_weight is given.
        weight_scale: [N, ceil(K/g)] float16 or float32. Where kernel_weight is given, which has the scales and zero
            points in it, only the shapes and types of these two count.
        zero_point: [N, ceil(K/g)] uint8, 0 to 15; None: 8 everywhere.
        bias: [N], any float type, or None.
        kernel_weight: the result of `int4_prepack`; without it the kernels of the CPU and of CUDA C++ rearrange the
            weight each time.
        group_size: g: 32, 64, 128, 256, 512, or K and more for one scale a channel.
        act_bits: bits of the activations: 2 to 8 symmetric, 2 to 7 asymmetric, or None.
        act_symmetric: signed without zero point, or unsigned with one.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        out_dtype: type of the result, by default that of `x`.
        residual: like the result in shape and type, added last; or None.

    Returns:
        [..., N].

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown activation, too many bits, K > 65536.
    """
    op = "int4_linear"
    check(
        op,
        x,
        weight,
        weight_scale,
        zero_point,
        bias,
        kernel_weight,
        group_size,
        act_bits,
        act_symmetric,
        activation,
        out_dtype,
    )
    check_residual(op, residual, x, weight_scale.shape[0], out_dtype)
    return backend.call(
        op,
        x,
        weight,
        weight_scale,
        zero_point,
        bias,
        kernel_weight,
        group_size,
        act_bits,
        act_symmetric,
        activation,
        out_dtype,
        residual,
    )


def check(
    op: str,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    group_size: int,
    act_bits: int | None,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    """Raises unless the arguments fit together; the message names `op`."""
    per_token.check_float(x, op, "x")
    if weight is None and kernel_weight is None:
        raise TypeError(message(op, "weight", "None", "uint8", "only a kernel_weight can take its place"))
    check_weight(op, weight, weight_scale, zero_point, x.shape[-1], group_size)
    n = weight_scale.shape[0]
    if weight is None and kernel_weight is not None:
        sizes = (n, x.shape[-1], group_size, weight_scale.element_size(), zero_point is not None)
        check_kernel_weight(op, kernel_weight, *sizes)
    check_bias(op, bias, n)
    if act_bits is not None:
        per_token.check_bits(act_bits, 8 if act_symmetric else 7, op, "act_bits")
    check_activation(op, activation)
    if out_dtype is not None and out_dtype not in per_token.FLOAT_DTYPES:
        raise TypeError(message(op, "out_dtype", out_dtype, "float32, bfloat16 or float16"))


def reference(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    group_size: int,
    act_bits: int | None,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    n, k = weight_scale.shape[0], x.shape[-1]
    if weight is None:
        assert kernel_weight is not None
        weight, weight_scale, zeros = unpack(
            kernel_weight, n, k, group_size, weight_scale.dtype, zero_point is not None
        )
        zero_point = None if zero_point is None else zeros
    q = unpack_int4(weight, k).int()
    a, scale = x.float(), torch.ones((), device=x.device)
    if act_bits is not None:
        integers, scale, act_zero = per_token.reference(x, act_bits, act_symmetric)
        a = (integers.int() - act_zero).float()
    y = x.new_zeros((*x.shape[:-1], n), dtype=torch.float32)
    for i in range(weight_scale.shape[1]):
        part = slice(i * group_size, (i + 1) * group_size)
        centred = q[:, part] - (SYMMETRIC_ZERO if zero_point is None else zero_point[:, i : i + 1].int())
        y = y + _group_sum(a[..., part], centred.float()) * weight_scale[:, i].float()
    return finish(y * scale, bias, activation, residual, out_dtype or x.dtype)


#: Partial sums of this many products stay below 2^24 in magnitude, where float32 is exact: 8192 · 127 · 15 < 2^24.
_EXACT_K = 8192


def _group_sum(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """a @ w.T; one rounding where both hold integers."""
    if a.shape[-1] <= _EXACT_K:
        return a @ w.t()
    parts = [a[..., k : k + _EXACT_K] @ w[:, k : k + _EXACT_K].t() for k in range(0, a.shape[-1], _EXACT_K)]
    return torch.stack(parts).double().sum(0).float()


def fake(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    group_size: int,
    act_bits: int | None,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight_scale.shape[0]), dtype=out_dtype or x.dtype)


def flops(x: torch.Tensor, weight: torch.Tensor | None, weight_scale: torch.Tensor, *args: object) -> int:
    return 2 * x.numel() * weight_scale.shape[0]


def nbytes(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    *args: object,
) -> int:
    n, k = weight_scale.shape[0], x.shape[-1]
    zeros = 0 if zero_point is None else zero_point.nbytes
    rows = x.numel() // max(k, 1)
    return n * (k + 1) // 2 + weight_scale.nbytes + zeros + (x.numel() + rows * n) * x.element_size()


define(
    Op(
        name="int4_linear",
        schema=(
            "(Tensor x, Tensor? weight, Tensor weight_scale, Tensor? zero_point, Tensor? bias, Tensor? kernel_weight,"
            " int group_size, int? act_bits, bool act_symmetric, str activation, ScalarType? out_dtype,"
            " Tensor? residual=None) -> Tensor"
        ),
        reference=reference,
        fake=fake,
        # As int8_linear; one rounding more a group, which torch's own sum has too.
        tolerance=4.0,
        flops=flops,
        nbytes=nbytes,
    )
)


def _cpu_unsupported(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    kernel_weight: torch.Tensor | None = None,
    *options: object,
    **more: object,
) -> str | None:
    return cpu_unsupported(x) or why_not_the_cpu_layout(kernel_weight)


backend.register_kernel("int4_linear", "cpu", unsupported=_cpu_unsupported)
