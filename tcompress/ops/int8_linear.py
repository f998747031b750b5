"""Linear layer with an int8 weight and activations quantized per token on the way in."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import quantize_per_token as per_token
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_prepack import kernel_bytes
from tcompress.ops.int8_unpack import reference as unpack

ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
#: int32 holds the sum of this many products of |a - zero_point| <= 255 and |w| <= 128.
MAX_K = 65536


def int8_linear(
    x: torch.Tensor,
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
    """`activation(x Wᵀ + bias) + residual` in integers: weight per output channel, activations dynamic per token.

    ::

        a, s, z  = quantize_per_token(x, act_bits, act_symmetric)
        acc[m,n] = Σ_k (a[m,k] - z[m]) · weight[n,k]                     exact, in int32
        y[m,n]   = activation(float32(acc) · s[m] · weight_scale[n] + bias[n]) + residual[m,n]

    The integers are the same on every backend and path, bit for bit. A token that holds NaN or infinity gives a row of
    NaN. Inference only: backward raises.

    Args:
        x: [..., K], float32, bfloat16 or float16; any strides.
        weight: [N, K] int8, the storage layout; None where kernel_weight is given.
        weight_scale: [N] float32; `W ≈ weight · weight_scale[:, None]`.
        bias: [N], any float type, or None.
        kernel_weight: the result of `int8_prepack(weight)`; without it a CPU kernel rearranges the weight each time.
        act_bits: bits of the activations: 2 to 8 symmetric, 2 to 7 asymmetric.
        act_symmetric: signed without zero point (W8A8), or unsigned with one (W8A7, W7A7).
        activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        out_dtype: type of the result, by default that of `x`. `torch.int32` gives `acc` itself: no scales, bias or
            activation are applied.
        residual: like the result in shape and type, added last; or None.

    Returns:
        [..., N].

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, an unknown activation, too many bits, K > 65536.
    """
    check("int8_linear", x, weight, weight_scale, bias, kernel_weight, act_bits, act_symmetric, activation, out_dtype)
    check_residual("int8_linear", residual, x, weight_scale.shape[0], out_dtype)
    return backend.call(
        "int8_linear",
        x,
        weight,
        weight_scale,
        bias,
        kernel_weight,
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
    bias: torch.Tensor | None,
    kernel_weight: torch.Tensor | None,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
) -> None:
    """Raises unless the arguments fit together; the message names `op`."""
    per_token.check_float(x, op, "x")
    if weight is None and kernel_weight is None:
        raise TypeError(message(op, "weight", "None", "int8 [N, K]", "only a kernel_weight can take its place"))
    if weight is not None and weight.dtype != torch.int8:
        raise TypeError(message(op, "weight", weight.dtype, "int8", "quantize it with tcompress.quantize.rtn"))
    if weight is not None and (weight.dim() != 2 or x.shape[-1] != weight.shape[1]):
        raise ValueError(message(op, "x, weight", f"{list(x.shape)}, {list(weight.shape)}", "[..., K], [N, K]"))
    k = x.shape[-1]
    n = weight.shape[0] if weight is not None else weight_scale.numel()
    if weight is None and kernel_weight is not None and kernel_weight.numel() != kernel_bytes(n, k):
        got = f"{list(x.shape)}, {list(kernel_weight.shape)}"
        raise ValueError(message(op, "x, kernel_weight", got, f"[..., K], [{kernel_bytes(n, k)}] for N={n}, K={k}"))
    if k > MAX_K:
        raise ValueError(message(op, "K", k, f"at most {MAX_K}", "a longer sum could leave int32"))
    if weight_scale.dtype != torch.float32:
        raise TypeError(message(op, "weight_scale", weight_scale.dtype, "float32"))
    if weight_scale.shape != (n,):
        raise ValueError(message(op, "weight_scale", list(weight_scale.shape), f"[{n}]"))
    check_bias(op, bias, n)
    per_token.check_bits(act_bits, 8 if act_symmetric else 7, op, "act_bits")
    check_activation(op, activation)
    if out_dtype is not None and out_dtype not in (*per_token.FLOAT_DTYPES, torch.int32):
        raise TypeError(message(op, "out_dtype", out_dtype, "float32, bfloat16, float16 or int32"))


def check_bias(op: str, bias: torch.Tensor | None, n: int) -> None:
    """Raises unless `bias` is None or a float tensor [N]."""
    if bias is not None and not bias.is_floating_point():
        raise TypeError(message(op, "bias", bias.dtype, "a float tensor"))
    if bias is not None and bias.shape != (n,):
        raise ValueError(message(op, "bias", list(bias.shape), f"[{n}]"))


def check_activation(op: str, activation: str) -> None:
    """Raises unless `activation` is one of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(message(op, "activation", repr(activation), f"one of {ACTIVATIONS}"))


def check_residual(
    op: str, residual: torch.Tensor | None, x: torch.Tensor, n: int, out_dtype: torch.dtype | None
) -> None:
    """Raises unless `residual` is None or has the result's shape and type."""
    if residual is None:
        return
    if out_dtype == torch.int32:
        raise ValueError(message(op, "residual", "a tensor", "None with out_dtype=torch.int32"))
    if residual.dtype != (out_dtype or x.dtype):
        raise TypeError(message(op, "residual", residual.dtype, f"{out_dtype or x.dtype}, the type of the result"))
    if residual.shape != (*x.shape[:-1], n):
        raise ValueError(message(op, "residual", list(residual.shape), [*x.shape[:-1], n]))


#: Partial sums of this many products stay below 2^24 in magnitude, where float32 is exact: 1024 · 127 · 128 < 2^24.
_EXACT_K = 1024


def integer_matmul(a: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`a @ weight.T` of 8-bit integers, |a| <= 127, exact in int32 at the speed of float32 matrix products.

    The order of summation does not matter, nor does a reduced-precision mode of the device: bfloat16 and TF32 hold
    8-bit integers exactly and accumulate in float32.
    """
    total = torch.zeros((*a.shape[:-1], weight.shape[0]), dtype=torch.int32, device=a.device)
    for k in range(0, a.shape[-1], _EXACT_K):
        part = a[..., k : k + _EXACT_K].float() @ weight[:, k : k + _EXACT_K].float().t()
        total += part.int()
    return total


def reference(
    x: torch.Tensor,
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
    if weight is None:
        assert kernel_weight is not None
        weight = unpack(kernel_weight, weight_scale.shape[0], x.shape[-1], None)
    a, scale, zero_point = per_token.reference(x, act_bits, act_symmetric)
    acc = integer_matmul(a, weight)
    if not act_symmetric:
        acc -= zero_point * weight.sum(1, dtype=torch.int32)
    if out_dtype == torch.int32:
        return acc
    return finish(acc.float() * scale * weight_scale, bias, activation, residual, out_dtype or x.dtype)


def finish(
    y: torch.Tensor, bias: torch.Tensor | None, activation: str, residual: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """What follows the sums, in float32: bias, activation, residual, and one rounding to `dtype`."""
    if bias is not None:
        y = y + bias.float()
    y = activate(y, activation)
    return (y if residual is None else y + residual.float()).to(dtype)


def activate(y: torch.Tensor, activation: str) -> torch.Tensor:
    """Applies one of `ACTIVATIONS`."""
    if activation == "relu":
        return F.relu(y)
    if activation == "gelu":
        return F.gelu(y)
    if activation == "gelu_tanh":
        return F.gelu(y, approximate="tanh")
    if activation == "silu":
        return F.silu(y)
    return y


def fake(
    x: torch.Tensor,
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


def flops(x: torch.Tensor, weight: torch.Tensor | None, weight_scale: torch.Tensor, *args: object) -> int:
    return 2 * x.numel() * weight_scale.numel()


def nbytes(x: torch.Tensor, weight: torch.Tensor | None, weight_scale: torch.Tensor, *args: object) -> int:
    n, k = weight_scale.numel(), x.shape[-1]
    rows = x.numel() // max(k, 1)
    return n * (k + 8) + (x.numel() + rows * n) * x.element_size()


define(
    Op(
        name="int8_linear",
        schema=(
            "(Tensor x, Tensor? weight, Tensor weight_scale, Tensor? bias, Tensor? kernel_weight, int act_bits,"
            " bool act_symmetric, str activation, ScalarType? out_dtype, Tensor? residual=None) -> Tensor"
        ),
        reference=reference,
        fake=fake,
        # Most of the error against float64 comes from three roundings, as in torch; the activations are polynomials.
        tolerance=4.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("int8_linear", "cpu", unsupported=cpu_unsupported)
