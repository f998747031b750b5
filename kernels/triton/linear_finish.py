"""What follows the exact sums: scales, bias, activation, residual, one rounding.

    y[m, n] = activation(float32(acc) · s[m] · weight_scale[n] + bias[n]) + residual[m, n]

OUT of int32 gets the sums themselves. An optional pointer that is not there points anywhere and its flag says so.
"""

from __future__ import annotations

import triton
import triton.language as tl

NONE, RELU, GELU, GELU_TANH, SILU = (tl.constexpr(i) for i in range(5))
#: In the order of the constants above.
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION == RELU:
        return tl.where(y < 0, 0.0, y)  # a maximum would lose NaN
    elif ACTIVATION == GELU:
        return 0.5 * y * (1.0 + tl.math.erf(y * 0.7071067811865476))
    elif ACTIVATION == GELU_TANH:
        # (1 + tanh z) / 2 = sigmoid(2z)
        return y * tl.sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    elif ACTIVATION == SILU:
        return y * tl.sigmoid(y)
    else:
        return y


@triton.jit
def finish_floats(
    y, rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores a tile of which y, float32 [rows, columns], has its scales already."""
    inside_n = columns < n
    inside = (rows < m)[:, None] & inside_n[None, :]
    if HAS_BIAS:
        y += tl.load(BIAS + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if HAS_RESIDUAL:
        at_residual = RESIDUAL + rows.to(tl.int64)[:, None] * stride_residual + columns[None, :]
        y += tl.load(at_residual, mask=inside, other=0.0).to(tl.float32)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    tl.store(OUT + at, y.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def finish(
    acc, rows, columns, m, n, scale, zero, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, stride_residual,
    HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Stores a tile. acc int32 [rows, columns]; scale float32 [rows], zero int32 [rows]."""
    inside_n = columns < n
    inside = (rows < m)[:, None] & inside_n[None, :]
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    if HAS_ZERO:
        acc -= zero[:, None] * tl.load(WEIGHT_SUM + columns, mask=inside_n, other=0)[None, :]
    if OUT.dtype.element_ty == tl.int32:
        tl.store(OUT + at, acc, mask=inside)
    else:
        weight_scale = tl.load(WEIGHT_SCALE + columns, mask=inside_n, other=0.0)
        y = acc.to(tl.float32) * scale[:, None] * weight_scale[None, :]
        finish_floats(
            y, rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
        )  # fmt: skip
