"""Fused int8 attention: softmax(scale · q kᵀ + mask) v, Q and K in int8, P and V in 16-bit floats.

    grid: one program a (block of BLOCK_M queries, head), the last block first: with a causal mask it has the most to do

    keys   0 ......................... plain end ............ end ....... Skv
           |  every query sees every key  | diagonal or tail  |  skipped   |
           |  plain_blocks                | masked_blocks     |            |

 1. attention_prepare: mean of K, integers of Q and K, two launches.
 2. Load the block of Q, which stays.
 3. plain_blocks up to where a query stops seeing a key; with a mask tensor there are none.
 4. masked_blocks up to the last key that a query sees.
 5. Divide by the sums; zeros where a query has seen no key. The logarithm of the sum, with what smoothing took from it.

V is read where it lies: float16 and bfloat16 as they are (P is rounded to the same type), float32 rounded to
bfloat16, whose range it has. The result is in memory [B, Sq, H, Dv], as that of the CPU kernels.

A V token that is not finite spoils queries of all blocks that touch it, seen or not (0 · NaN), as in torch's own
attention in plain operations; a K token: attention_prepare.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import attention_prepare
from .attention_blocks import BOOL_MASK, FLOAT_MASK, NO_MASK, masked_blocks, plain_blocks
from .attention_tiles import Tiles, tiles
from .numbers import capability

LN_2 = tl.constexpr(0.6931471805599453)
MAX_HEAD = 256


# Addresses do not depend on the divisibility of these: one compilation serves all lengths.
@triton.jit(do_not_specialize=["sq", "skv", "heads", "group", "m_blocks", "n_blocks", "offset", "scale"])
def attend(
    Q, Q_SCALE, K, K_SCALE, V, MASK_PTR, SHIFT, OUT, LSE,
    sq, skv, dv, heads, group, m_blocks, n_blocks, offset, scale,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, V_TAIL: tl.constexpr,
    CAUSAL: tl.constexpr, MASK: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    # 1D: the other axes of a grid end at 65535
    pid = tl.program_id(0)
    block = m_blocks - 1 - pid % m_blocks
    bh = pid // m_blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    kv_heads = heads // group
    kv = b * kv_heads + h // group

    rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
    keys, channels, columns = tl.arange(0, BLOCK_N), tl.arange(0, DP), tl.arange(0, DVP)
    padded = bh.to(tl.int64) * (m_blocks * BLOCK_M) + rows
    q = tl.load(Q + padded[:, None] * DP + channels[None, :])
    q_scale = tl.load(Q_SCALE + padded)
    k_at = K + (kv * n_blocks * BLOCK_N + keys)[:, None] * DP + channels[None, :]
    k_scale_at = K_SCALE + kv * n_blocks
    v_at = V + b * v_stride_b + (h // group) * v_stride_h + keys[:, None] * v_stride_s + columns[None, :] * v_stride_d
    columns_ok = (columns < dv)[None, :]
    # within a tile 32 bits are enough, and half the registers
    mask_at = MASK_PTR + b * mask_stride_b + h * mask_stride_h + (block * BLOCK_M).to(tl.int64) * mask_stride_m
    mask_rows = tl.arange(0, BLOCK_M)[:, None] * mask_stride_m

    # the first key that the first query does not see, and the one after the last that the last query does
    plain_end, end = skv, skv
    if CAUSAL:
        plain_end = tl.minimum(skv, tl.maximum(0, block * BLOCK_M + offset + 1))
        end = tl.minimum(skv, tl.maximum(0, (block + 1) * BLOCK_M + offset))
    plain_end = plain_end // BLOCK_N * BLOCK_N
    if MASK != NO_MASK:
        plain_end = 0

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    if MASK == NO_MASK:
        acc, total, top = plain_blocks(
            acc, total, top, q, q_scale, k_at, k_scale_at, v_at, columns_ok, v_stride_s, 0, plain_end,
            BLOCK_N, DP, V_TAIL,
        )  # fmt: skip
    acc, total, top = masked_blocks(
        acc, total, top, q, q_scale, k_at, k_scale_at, v_at, columns_ok, v_stride_s, plain_end, end,
        rows, sq, skv, offset, mask_at, mask_rows, mask_stride_n, BLOCK_N, DP, CAUSAL, MASK,
    )  # fmt: skip

    empty = top == float("-inf")
    # NaN in the sums is not empty: top is taken of what is seen, but a maximum passes NaN over
    empty = empty & (total == 0.0)
    acc = acc * tl.where(empty, 0.0, 1.0 / total)[:, None]
    inside = rows < sq
    out_at = OUT + ((b * sq + rows)[:, None] * heads + h) * dv + columns[None, :]
    tl.store(out_at, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & columns_ok)
    if HAS_LSE:
        shift = tl.load(SHIFT + padded)
        lse = (top + tl.math.log2(total)) * LN_2 + scale * shift
        tl.store(LSE + bh.to(tl.int64) * sq + rows, tl.where(empty, float("-inf"), lse), mask=inside)


def unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> str | None:
    """Why this kernel cannot take the arguments of `quantized_attention`, or None."""
    if bits != 8:
        return f"bits={bits}: the Triton kernel has 8"
    if left >= 0 or right > 0:
        return "the Triton kernel has no window"
    if softcap:
        return "the Triton kernel has no softcap"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD:
        return f"a head of more than {MAX_HEAD}"
    return None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bottom_right: bool = False,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    tile: Tiles | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantized_attention` in 8 bits, without window and softcap; checked arguments.

    Args:
        q, k, v: [B, H, Sq, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv], one float type, any strides.
        mask: a view of shape [B, H, Sq, Skv] (`expand`), bool or float; None.
        bottom_right, causal: query i sees keys up to i, or up to i + Skv - Sq.
        scale: 1/√D by default.
        return_lse: also the logarithm of the softmax's denominator.
        tile: other sizes than `attention_tiles` has.

    Returns:
        [B, H, Sq, Dv] in the type of q, and [B, H, Sq] float32, empty unless asked for.
    """
    b, heads, sq, d = q.shape
    kv_heads, skv, dv = k.shape[1], k.shape[2], v.shape[3]
    scale = 1.0 / max(d, 1) ** 0.5 if scale is None else scale
    out = torch.empty((b, sq, heads, dv), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((b, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    if skv == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    dp, dvp = attention_prepare.padded_head(d), max(16, triton.next_power_of_2(max(dv, 1)))
    tile = tile or tiles(capability(q), max(dp, dvp), sq, mask is not None)
    x = attention_prepare.quantize(q, k, scale, tile.block_m, tile.block_n, return_lse)
    v = v.to(torch.bfloat16) if v.dtype == torch.float32 else v
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    mask_ptr = x.q if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    m_blocks, n_blocks = x.q.shape[1] // tile.block_m, x.k_scale.shape[1]
    # an option that only NVIDIA's compiler knows: not even None may be given to another
    bound = {} if tile.registers is None else {"maxnreg": tile.registers}
    attend[(b * heads * m_blocks,)](
        x.q, x.q_scale, x.k, x.k_scale, v, mask_ptr, x.q_scale if x.shift is None else x.shift, out, lse,
        sq, skv, dv, heads, heads // kv_heads, m_blocks, n_blocks, skv - sq if bottom_right else 0, scale,
        *v.stride(), *((0, 0, 0, 0) if mask is None else mask.stride()),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DP=dp, DVP=dvp, V_TAIL=dv != dvp,
        CAUSAL=causal, MASK=kind.value, HAS_LSE=return_lse,
        num_warps=tile.warps, num_stages=tile.stages, **bound,
    )  # fmt: skip
    return out, lse
