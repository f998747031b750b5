"""Rotary position embedding of queries or keys, and integers of each token and head, in one launch.

    x [B, H, S, D] any float, strided   ->   q [B, H, S, Dp] int8, padding 0;  scale [B, H, S] float32
    cos, sin [positions, R/2] float

    which channels are turned together, R = 8:    halves        0 1 2 3 | 4 5 6 7    c with c + R/2
                                                  interleaved   0 1 | 2 3 | 4 5 | 6 7

 1. A program takes ROWS tokens of heads, in the order of the output.
 2. y = x · cos ∓ partner · sin for the first R channels, x for the others; in float32, rounded to the type of x: what
    a module in between would give.
 3. Symmetric integers of y as `quantize_per_token` defines them, bit for bit.

A token that is not finite has scale NaN and integers 0. Dp: D up to a multiple of 16, so that rows load wide.

Constraints (`unsupported`): R even, at most D, D at most 1024; 2 to 8 bits.

Paper: Su et al. (RoFormer), arXiv 2104.09864, section 3.2.2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .numbers import all_finite, steps
from .quantize_tokens import integers, padded_width, scale_of_range

MAX_HEAD = 1024
#: Values of a program.
VALUES = 2048


@triton.jit(do_not_specialize=["rows", "heads", "s", "first"])
def rotate_and_quantize(
    X, COS, SIN, POSITIONS, Q, SCALE,
    rows, heads, s, d, d_padded, first, stride_b, stride_h, stride_s, stride_d, position_stride_b,
    Q_MAX: tl.constexpr, STEP: tl.constexpr, LOWEST: tl.constexpr, ROTATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    b, h, token = row // (heads * s), row // s % heads, row % s
    c = tl.arange(0, DP)[None, :]
    turned = c < ROTATED
    if INTERLEAVED:
        partner, angle, first_of_pair = c ^ 1, c // 2, c % 2 == 0
    else:
        half: tl.constexpr = ROTATED // 2
        partner, angle, first_of_pair = (
            tl.where(c < half, c + half, c - half),
            tl.where(c < half, c, c - half),
            c < half,
        )
    x_at = b.to(tl.int64) * stride_b + h.to(tl.int64) * stride_h + token.to(tl.int64) * stride_s
    x = tl.load(X + x_at[:, None] + c.to(tl.int64) * stride_d, mask=inside & (c < d), other=0.0).to(tl.float32)
    other = tl.load(X + x_at[:, None] + partner.to(tl.int64) * stride_d, mask=inside & turned, other=0.0)
    if HAS_POSITIONS:
        position = tl.load(POSITIONS + b * position_stride_b + token, mask=row < rows, other=0).to(tl.int64)
    else:
        position = first + token.to(tl.int64)
    angle_at = position[:, None] * (ROTATED // 2) + angle
    cos = tl.load(COS + angle_at, mask=inside & turned, other=1.0).to(tl.float32)
    sin = tl.load(SIN + angle_at, mask=inside & turned, other=0.0).to(tl.float32)
    cross = other.to(tl.float32) * sin
    y = tl.where(turned, x * cos + tl.where(first_of_pair, -cross, cross), x)
    y = y.to(X.dtype.element_ty).to(tl.float32)
    ok = all_finite(y, 1)
    low, high = tl.minimum(tl.min(y, 1), 0.0), tl.maximum(tl.max(y, 1), 0.0)
    scale, inverse, zero = scale_of_range(low, high, ok, STEP, LOWEST, True)
    q = integers(y, ok[:, None], inverse[:, None], zero[:, None], Q_MAX, True)
    tl.store(Q + row.to(tl.int64)[:, None] * d_padded + c, tl.where(c < d, q, 0), mask=inside & (c < d_padded))
    tl.store(SCALE + row, scale, mask=row < rows)


def unsupported(d: int, rotated: int, bits: int) -> str | None:
    """Why this kernel cannot turn `rotated` channels of a head of d, or None."""
    if d > MAX_HEAD:
        return f"a head of more than {MAX_HEAD}"
    if rotated % 2 or rotated > d:
        return f"{rotated} rotated channels of {d}: an even number up to the head size"
    return None if 2 <= bits <= 8 else f"bits={bits}: 2 to 8"


def quantize_rotary(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    first: int = 0,
    interleaved: bool = False,
    bits: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers of `x` after rotary position embedding.

    Args:
        x: [B, H, S, D], float32, bfloat16 or float16; any strides.
        cos, sin: [positions, R/2], one float type, contiguous; R channels are turned. A position's row must be there.
        positions: [B, S] or [S] integers: the position of each token; None: `first`, first + 1, …
        first: position of the first token.
        interleaved: neighbours are turned together; else halves.
        bits: 2 to 8.

    Returns:
        q: [B, H, S, Dp] int8, channels from D on are 0. scale: [B, H, S] float32.
    """
    b, heads, s, d = x.shape
    width = padded_width(d)
    q = torch.empty((b, heads, s, width), dtype=torch.int8, device=x.device)
    scale = torch.empty((b, heads, s), dtype=torch.float32, device=x.device)
    rows = b * heads * s
    if rows == 0:
        return q, scale
    if positions is not None:
        positions = positions.expand(b, s)
        positions = positions if positions.stride(1) == 1 else positions.contiguous()
    dp = triton.next_power_of_2(width)
    block = max(1, VALUES // dp)
    q_max, step, lowest = steps(bits, True)
    rotate_and_quantize[(triton.cdiv(rows, block),)](
        x, cos, sin, cos if positions is None else positions, q, scale,
        rows, heads, s, d, width, first, *x.stride(), 0 if positions is None else positions.stride(0),
        Q_MAX=q_max, STEP=step, LOWEST=lowest, ROTATED=2 * cos.shape[1], INTERLEAVED=interleaved,
        HAS_POSITIONS=positions is not None, ROWS=block, DP=dp, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return q, scale
