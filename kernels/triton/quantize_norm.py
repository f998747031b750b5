"""RMSNorm or LayerNorm, and per-token quantization of what it gives, in one launch.

    x [M, K] any float (+ residual [M, K])  ->  q [M, Kp] int8, scale [M] float32, zero_point [M] int32: quantize_tokens
                                                sum [M, K] in the type of x, where there is a residual
                                                normed [M, K] in the type of x, if asked for

 1. One program a row, or several short ones. A row that fits is read once and kept in registers; of a longer one the
    later passes read the second-level cache.
 2. x + residual, rounded to the type of x, and stored.
 3. LayerNorm: mean, then the mean of squared differences. RMSNorm: the mean of squares. In float32.
 4. y = x / √(mean of squares + eps) · weight + bias, rounded to the type of x: what a module in between would give.
 5. Integers of y as `quantize_per_token` defines them, bit for bit.

A row that is not finite, or becomes so, has scale NaN and integers 0.

Constraints: asymmetric up to 7 bits, so that the integers fit int8 (`unsupported`).

Papers: Ba et al., arXiv 1607.06450, section 3; Zhang & Sennrich (RMSNorm), arXiv 1910.07467, section 4.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .numbers import all_finite, finite, steps
from .quantize_tokens import LONGEST_BLOCK, integers, padded_width, scale_of_range


class Normed(NamedTuple):
    """Integers and scales of the normed rows; the sum and the normed rows where there is such."""

    q: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor
    total: torch.Tensor | None
    normed: torch.Tensor | None


@triton.jit
def _read(X, RESIDUAL, TOTAL, x_at, residual_at, total_at, inside, HAS_RESIDUAL: tl.constexpr, STORE: tl.constexpr):
    x = tl.load(X + x_at, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        residual = tl.load(RESIDUAL + residual_at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(X.dtype.element_ty)
        if STORE:
            tl.store(TOTAL + total_at, x, mask=inside)
    return x.to(tl.float32)


@triton.jit
def _norm(
    x, mean, factor, WEIGHT, BIAS, at, inside_k, dtype: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):
    y = (x - mean) * factor
    if HAS_WEIGHT:
        y = y * tl.load(WEIGHT + at, mask=inside_k, other=0.0).to(tl.float32)
    if HAS_BIAS:
        y = y + tl.load(BIAS + at, mask=inside_k, other=0.0).to(tl.float32)
    return tl.where(inside_k, y.to(dtype).to(tl.float32), 0.0)


@triton.jit
def _factor(squares, k, eps):
    return tl.math.div_rn(1.0, tl.math.sqrt_rn(squares / k + eps))


@triton.jit(do_not_specialize=["m", "eps"])
def normalize_and_quantize(
    X, RESIDUAL, WEIGHT, BIAS, Q, SCALE, ZERO, TOTAL, NORMED,
    m, k, k_padded, eps, x_stride_m, x_stride_k, residual_stride_m, residual_stride_k,
    Q_MAX: tl.constexpr, STEP: tl.constexpr, LOWEST: tl.constexpr, SYMMETRIC: tl.constexpr, CENTRE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_NORMED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (rows < m)[:, None]
    row = rows.to(tl.int64)[:, None]
    x_row, residual_row, dense_row = row * x_stride_m, row * residual_stride_m, row * k
    columns = tl.arange(0, BLOCK_K)[None, :]
    dtype: tl.constexpr = X.dtype.element_ty
    mean = tl.zeros([ROWS, 1], tl.float32)
    if ONE_BLOCK:
        at = columns
        inside_k = at < k
        x = _read(
            X, RESIDUAL, TOTAL, x_row + at.to(tl.int64) * x_stride_k,
            residual_row + at.to(tl.int64) * residual_stride_k, dense_row + at, inside & inside_k, HAS_RESIDUAL, True,
        )  # fmt: skip
        if CENTRE:
            mean = (tl.sum(x, 1) / k)[:, None]
        squares = tl.sum(tl.where(inside_k, (x - mean) * (x - mean), 0.0), 1)
        y = _norm(x, mean, _factor(squares, k, eps)[:, None], WEIGHT, BIAS, at, inside_k, dtype, HAS_WEIGHT, HAS_BIAS)
        ok = all_finite(y, 1)
        low, high = tl.minimum(tl.min(y, 1), 0.0), tl.maximum(tl.max(y, 1), 0.0)
        scale, inverse, zero = scale_of_range(low, high, ok, STEP, LOWEST, SYMMETRIC)
        q = integers(y, ok[:, None], inverse[:, None], zero[:, None], Q_MAX, SYMMETRIC)
        tl.store(Q + row * k_padded + at, tl.where(inside_k, q, 0), mask=inside & (at < k_padded))
        if HAS_NORMED:
            tl.store(NORMED + dense_row + at, y.to(dtype), mask=inside & inside_k)
    else:
        sums = tl.zeros([ROWS, BLOCK_K], tl.float32)
        for start in range(0, k, BLOCK_K):
            at = start + columns
            x = _read(
                X, RESIDUAL, TOTAL, x_row + at.to(tl.int64) * x_stride_k,
                residual_row + at.to(tl.int64) * residual_stride_k, dense_row + at, inside & (at < k),
                HAS_RESIDUAL, True,
            )  # fmt: skip
            if CENTRE:
                sums += x
            else:
                sums += x * x
        if CENTRE:
            mean = (tl.sum(sums, 1) / k)[:, None]
            sums = tl.zeros([ROWS, BLOCK_K], tl.float32)
            for start in range(0, k, BLOCK_K):
                at = start + columns
                x = _read(
                    X, RESIDUAL, TOTAL, x_row + at.to(tl.int64) * x_stride_k,
                    residual_row + at.to(tl.int64) * residual_stride_k, dense_row + at, inside & (at < k),
                    HAS_RESIDUAL, False,
                )  # fmt: skip
                sums += tl.where(at < k, (x - mean) * (x - mean), 0.0)
        factor = _factor(tl.sum(sums, 1), k, eps)[:, None]
        # element by element, reduced after the loop, as in quantize_tokens
        lows = tl.zeros([ROWS, BLOCK_K], tl.float32)
        highs = tl.zeros([ROWS, BLOCK_K], tl.float32)
        oks = tl.full([ROWS, BLOCK_K], 1, tl.int1)
        for start in range(0, k, BLOCK_K):
            at = start + columns
            x = _read(
                X, RESIDUAL, TOTAL, x_row + at.to(tl.int64) * x_stride_k,
                residual_row + at.to(tl.int64) * residual_stride_k, dense_row + at, inside & (at < k),
                HAS_RESIDUAL, False,
            )  # fmt: skip
            y = _norm(x, mean, factor, WEIGHT, BIAS, at, at < k, dtype, HAS_WEIGHT, HAS_BIAS)
            lows, highs, oks = tl.minimum(lows, y), tl.maximum(highs, y), oks & finite(y)
            if HAS_NORMED:
                tl.store(NORMED + dense_row + at, y.to(dtype), mask=inside & (at < k))
        ok = tl.min(oks.to(tl.int32), 1) != 0
        scale, inverse, zero = scale_of_range(tl.min(lows, 1), tl.max(highs, 1), ok, STEP, LOWEST, SYMMETRIC)
        for start in range(0, k_padded, BLOCK_K):
            at = start + columns
            x = _read(
                X, RESIDUAL, TOTAL, x_row + at.to(tl.int64) * x_stride_k,
                residual_row + at.to(tl.int64) * residual_stride_k, dense_row + at, inside & (at < k),
                HAS_RESIDUAL, False,
            )  # fmt: skip
            y = _norm(x, mean, factor, WEIGHT, BIAS, at, at < k, dtype, HAS_WEIGHT, HAS_BIAS)
            q = integers(y, ok[:, None], inverse[:, None], zero[:, None], Q_MAX, SYMMETRIC)
            tl.store(Q + row * k_padded + at, tl.where(at < k, q, 0), mask=inside & (at < k_padded))
    tl.store(SCALE + rows, scale, mask=rows < m)
    tl.store(ZERO + rows, zero.to(tl.int32), mask=rows < m)


def unsupported(bits: int, symmetric: bool) -> str | None:
    """Why this kernel cannot give such integers, or None."""
    highest = 8 if symmetric else 7
    return None if 2 <= bits <= highest else f"bits={bits}: 2 to {highest} fit int8"


def quantize_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    centre: bool = False,
    residual: torch.Tensor | None = None,
    bits: int = 8,
    symmetric: bool = True,
    return_normed: bool = False,
) -> Normed:
    """Integers of each normed row of `x`, or of `x + residual`.

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides.
        weight, bias: [K], any float type; None for 1 and 0.
        eps: added to the mean of squares.
        centre: LayerNorm; else RMSNorm.
        residual: like x, added first; the sum is returned too.
        bits, symmetric: as `quantize_tokens` has them.
        return_normed: also the normed rows in floats.
    """
    m, k = x.shape
    width, device = padded_width(k), x.device
    out = Normed(
        torch.empty((m, width), dtype=torch.int8, device=device),
        torch.empty(m, dtype=torch.float32, device=device),
        torch.empty(m, dtype=torch.int32, device=device),
        torch.empty((m, k), dtype=x.dtype, device=device) if residual is not None else None,
        torch.empty((m, k), dtype=x.dtype, device=device) if return_normed else None,
    )
    if m == 0:
        return out
    q_max, step, lowest = steps(bits, symmetric)
    block = min(LONGEST_BLOCK, triton.next_power_of_2(width))
    rows = max(1, 1024 // block)
    normalize_and_quantize[(triton.cdiv(m, rows),)](
        x, x if residual is None else residual, x if weight is None else weight.contiguous(),
        x if bias is None else bias.contiguous(), out.q, out.scale, out.zero_point,
        x if out.total is None else out.total, x if out.normed is None else out.normed,
        m, k, width, eps, *x.stride(), *((0, 0) if residual is None else residual.stride()),
        Q_MAX=q_max, STEP=step, LOWEST=lowest, SYMMETRIC=symmetric, CENTRE=centre, HAS_WEIGHT=weight is not None,
        HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None, HAS_NORMED=return_normed,
        ROWS=rows, BLOCK_K=block, ONE_BLOCK=block >= width,
        num_warps=16 if block >= 8192 else 8 if block >= 4096 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
