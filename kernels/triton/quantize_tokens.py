"""Per-token quantization: float rows to integers, as `quantize_per_token` defines them, bit for bit.

    x [M, K] any float, strided  ->  q [M, Kp] int8 (uint8 values up to 127 fit too; Kp: K up to a multiple of 16,
    padding 0)
                                     scale [M] float32, zero_point [M] int32
    panel C: q [Kp/C][Mp][C] instead, Mp rows from M on not written, for kernels that pick columns (block_panels)

 1. One program a row (short rows: several). A row that fits is read once and kept in registers; a longer one is read
    twice, the second time from the second-level cache.
 2. Largest magnitude (or lowest and highest), whether all is finite.
 3. scale, its reciprocal, integers; a row that is not finite has scale NaN and integers 0.

Constraints (`bindings`): asymmetric up to 7 bits, so that the integers fit int8.

Kp: rows of whole 16-byte words load wide in the product after.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .numbers import all_finite, clamp, finite, reciprocal, round_half_even, steps

#: Values of a row that a program keeps in registers: 16 bytes a thread and load with 8 warps.
LONGEST_BLOCK = 8192


@triton.jit
def scale_of_range(low, high, ok, STEP: tl.constexpr, LOWEST: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Scale, reciprocal (0 where not ok) and zero point, for the range of a row that includes 0."""
    if SYMMETRIC:
        scale = tl.maximum(-low, high) * STEP
    else:
        scale = high * STEP - low * STEP
    scale = tl.maximum(scale, LOWEST)
    inverse = tl.where(ok, reciprocal(scale), 0.0)
    if SYMMETRIC:
        zero = tl.zeros_like(scale)
    else:
        zero = tl.where(ok, round_half_even(tl.where(ok, -low, 0.0) * inverse), 0.0)
    return tl.where(ok, scale, float("nan")), inverse, zero


@triton.jit
def integers(x, ok, inverse, zero, Q_MAX: tl.constexpr, SYMMETRIC: tl.constexpr):
    """Of x, with `ok`, `inverse` and `zero` shaped to broadcast; int8."""
    q = round_half_even(tl.where(ok, x, 0.0) * inverse) + zero
    if not SYMMETRIC:
        q = clamp(q, 0, Q_MAX)
    # symmetric: |x| · inverse <= q_max (1 + 2^-22), which rounds to q_max
    return q.to(tl.int8)


@triton.jit
def _place(column, panel_stride, PANEL: tl.constexpr):
    """Of a column, from its row's first byte on."""
    if PANEL:
        return (column // PANEL).to(tl.int64) * panel_stride + column % PANEL
    else:
        return column


@triton.jit(do_not_specialize=["m", "panel_stride"])
def quantize_rows(
    X, Q, SCALE, ZERO,
    m, k, k_padded, stride_m, stride_k, panel_stride,
    Q_MAX: tl.constexpr, STEP: tl.constexpr, LOWEST: tl.constexpr, SYMMETRIC: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, ONE_BLOCK: tl.constexpr, PANEL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_K)
    inside = (rows < m)[:, None]
    row_ptr = X + rows.to(tl.int64)[:, None] * stride_m
    out_ptr = Q + rows.to(tl.int64)[:, None] * (PANEL if PANEL else k_padded)
    if ONE_BLOCK:
        at = columns[None, :]
        x = tl.load(row_ptr + at.to(tl.int64) * stride_k, mask=inside & (at < k), other=0.0).to(tl.float32)
        row_ok = all_finite(x, 1)
        low, high = tl.minimum(tl.min(x, 1), 0.0), tl.maximum(tl.max(x, 1), 0.0)
        scale, inverse, zero = scale_of_range(low, high, row_ok, STEP, LOWEST, SYMMETRIC)
        q = integers(x, row_ok[:, None], inverse[:, None], zero[:, None], Q_MAX, SYMMETRIC)
        tl.store(out_ptr + _place(at, panel_stride, PANEL), tl.where(at < k, q, 0), mask=inside & (at < k_padded))
    else:
        # element by element, reduced after the loop: Triton 3.6 fails to compile a loop of reductions used twice
        lows = tl.zeros([ROWS, BLOCK_K], tl.float32)
        highs = tl.zeros([ROWS, BLOCK_K], tl.float32)
        oks = tl.full([ROWS, BLOCK_K], 1, tl.int1)
        for start in range(0, k, BLOCK_K):
            at = (start + columns)[None, :]
            x = tl.load(row_ptr + at.to(tl.int64) * stride_k, mask=inside & (at < k), other=0.0).to(tl.float32)
            lows, highs, oks = tl.minimum(lows, x), tl.maximum(highs, x), oks & finite(x)
        row_ok = tl.min(oks.to(tl.int32), 1) != 0
        scale, inverse, zero = scale_of_range(tl.min(lows, 1), tl.max(highs, 1), row_ok, STEP, LOWEST, SYMMETRIC)
        for start in range(0, k_padded, BLOCK_K):
            at = (start + columns)[None, :]
            x = tl.load(row_ptr + at.to(tl.int64) * stride_k, mask=inside & (at < k), other=0.0).to(tl.float32)
            q = integers(x, row_ok[:, None], inverse[:, None], zero[:, None], Q_MAX, SYMMETRIC)
            tl.store(out_ptr + _place(at, panel_stride, PANEL), tl.where(at < k, q, 0), mask=inside & (at < k_padded))
    tl.store(SCALE + rows, scale, mask=rows < m)
    tl.store(ZERO + rows, zero.to(tl.int32), mask=rows < m)


def padded_width(k: int) -> int:
    return max(16, -(-k // 16) * 16)


def aligned_rows(x: torch.Tensor) -> torch.Tensor:
    """int8 [N, K] with rows that start at multiples of 16 bytes: `x`, or a copy that ends in zeros. Where they do not,
    kernels load byte by byte, and the wide ones spill hundreds of registers."""
    aligned = x.stride(0) % 16 == 0 and x.storage_offset() % 16 == 0
    return x if aligned else torch.nn.functional.pad(x, (0, padded_width(x.shape[1]) - x.shape[1]))


def quantize_tokens(
    x: torch.Tensor, bits: int = 8, symmetric: bool = True, panel: int = 0, rows_padded: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Integers of each row of `x` [M, K].

    Args:
        x: [M, K], float32, bfloat16 or float16; any strides.
        bits: 2 to 8; at most 7 if not symmetric.
        symmetric: see `tcompress.ops.quantize_per_token`.
        panel: 0 for rows, or C, a divisor of 16, for panels of C columns with `rows_padded` rows, at least M.

    Returns:
        q: [M, Kp] int8, or [Kp/C, rows_padded, C]; columns from K on are 0 (the zero point of a padded column is not
        subtracted: multiply with zeros).
        scale: [M] float32. zero_point: [M] int32.
    """
    m, k = x.shape
    width = padded_width(k)
    shape = (width // panel, rows_padded, panel) if panel else (m, width)
    q = torch.empty(shape, dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    zero = torch.empty(m, dtype=torch.int32, device=x.device)
    if m == 0:
        return q, scale, zero
    q_max, step, lowest = steps(bits, symmetric)
    block = min(LONGEST_BLOCK, triton.next_power_of_2(width))
    rows = max(1, 1024 // block)
    quantize_rows[(triton.cdiv(m, rows),)](
        x, q, scale, zero, m, k, width, x.stride(0), x.stride(1), rows_padded * panel,
        Q_MAX=q_max, STEP=step, LOWEST=lowest, SYMMETRIC=symmetric,
        ROWS=rows, BLOCK_K=block, ONE_BLOCK=block >= width, PANEL=panel,
        num_warps=8 if block >= 4096 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale, zero
