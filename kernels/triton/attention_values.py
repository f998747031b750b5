"""V to integers, for attention whose second product is one of bytes (`attention`, value_bits=8).

    v [B, Hkv, Skv, Dv]  ->  [B·Hkv, DVP, Skp] int8, keys side by side, as products of bytes want them; zeros beyond
                             scale [B·Hkv, DVP]: a channel's, over all tokens

 1. value_ranges: the largest magnitudes of pieces of the tokens.
 2. quantize: a program takes a block of keys and puts the range together from the pieces.

A channel with a value that is not finite has scale NaN: of that channel all queries become NaN.

Paper: Zhang et al. (SageAttention), arXiv 2410.02367, section 4.3.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_prepare import MOST_PIECES, PIECE, SUM_TOKENS
from .numbers import finite, reciprocal, round_half_even, steps

_, STEP, LOWEST = steps(8, True)


@triton.jit(do_not_specialize=["skv", "heads", "piece"])
def value_ranges(
    V, RANGES, skv, dv, heads, stride_b, stride_h, stride_s, stride_d, piece,
    TOKENS: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    bh, part = tl.program_id(0), tl.program_id(1)
    base = V + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    columns = tl.arange(0, DVP)
    most = tl.zeros([TOKENS, DVP], tl.float32)
    for start in range(part * piece, tl.minimum(skv, (part + 1) * piece), TOKENS):
        tokens = (start + tl.arange(0, TOKENS))[:, None]
        at = base + tokens.to(tl.int64) * stride_s + columns[None, :] * stride_d
        x = tl.load(at, mask=(tokens < skv) & (columns[None, :] < dv), other=0.0).to(tl.float32)
        most = tl.maximum(most, tl.where(finite(x), tl.abs(x), float("inf")))
    tl.store(RANGES + (bh * tl.num_programs(1) + part) * DVP + columns, tl.max(most, 0))


@triton.jit(do_not_specialize=["skv", "heads", "blocks", "parts"])
def quantize_value_blocks(
    V, RANGES, OUT, SCALE, skv, dv, heads, blocks, parts, stride_b, stride_h, stride_s, stride_d,
    STEP: tl.constexpr, LOWEST: tl.constexpr, BLOCK_N: tl.constexpr, DVP: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    bh, block = pid // blocks, pid % blocks
    columns, part = tl.arange(0, DVP), tl.arange(0, PARTS)[:, None]
    ranges = tl.load(RANGES + (bh * parts + part) * DVP + columns[None, :], mask=part < parts, other=0.0)
    most = tl.max(ranges, 0)
    scale = tl.maximum(most * STEP, LOWEST)
    ok = finite(most)
    inverse = tl.where(ok, reciprocal(scale), 0.0)
    tokens = block * BLOCK_N + tl.arange(0, BLOCK_N)
    base = V + (bh // heads).to(tl.int64) * stride_b + (bh % heads).to(tl.int64) * stride_h
    at = base + tokens.to(tl.int64)[:, None] * stride_s + columns[None, :] * stride_d
    x = tl.load(at, mask=(tokens < skv)[:, None] & (columns < dv)[None, :], other=0.0).to(tl.float32)
    q = round_half_even(tl.where(ok[None, :], x, 0.0) * inverse[None, :])
    out_at = OUT + (bh.to(tl.int64) * DVP + columns)[None, :] * (blocks * BLOCK_N) + tokens[:, None]
    tl.store(out_at, q.to(tl.int8))
    if block == 0:
        tl.store(SCALE + bh * DVP + columns, tl.where(ok, scale, float("nan")))


def quantize_values(v: torch.Tensor, block_n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """V as integers and their scales, as the head of this file has them.

    Args:
        v: [B, Hkv, Skv, Dv], any float type, any strides, not empty.
        block_n: keys of a tile of the attention kernel.
    """
    b, heads, skv, dv = v.shape
    dvp, blocks = padded_values(dv), triton.cdiv(skv, block_n)
    piece = max(PIECE, triton.cdiv(triton.cdiv(skv, MOST_PIECES), SUM_TOKENS) * SUM_TOKENS)
    parts = triton.cdiv(skv, piece)
    ranges = torch.empty((b * heads, parts, dvp), dtype=torch.float32, device=v.device)
    out = torch.empty((b * heads, dvp, blocks * block_n), dtype=torch.int8, device=v.device)
    scale = torch.empty((b * heads, dvp), dtype=torch.float32, device=v.device)
    value_ranges[(b * heads, parts)](
        v, ranges, skv, dv, heads, *v.stride(), piece, TOKENS=SUM_TOKENS, DVP=dvp, num_warps=4
    )
    quantize_value_blocks[(b * heads * blocks,)](
        v, ranges, out, scale, skv, dv, heads, blocks, parts, *v.stride(),
        STEP=STEP, LOWEST=LOWEST, BLOCK_N=block_n, DVP=dvp, PARTS=triton.next_power_of_2(parts),
        num_warps=8 if block_n * dvp >= 8192 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return out, scale


def padded_values(dv: int) -> int:
    """The width of V's tiles: products take at least 16 columns."""
    return max(16, triton.next_power_of_2(max(dv, 1)))
