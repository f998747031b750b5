"""Fused int8 attention: softmax(scale · q kᵀ + mask) v, Q and K in int8, P and V in 16-bit floats.

    grid: one program a (block of BLOCK_M queries, head), the last block first: with a causal mask it has the most to do

    keys   0 ........ low ....... plain low ................ plain end ............ end ....... Skv
           | skipped  | left edge  | every query sees every key | diagonal or tail  |  skipped   |
           |          | masked     | plain_blocks               | masked_blocks     |            |

 1. attention_prepare: mean of K, integers of Q and K, two launches.
 2. Load the block of Q, which stays.
 3. With a limit to the left, masked_blocks from the first key that a query sees. plain_blocks up to where a query
    stops seeing a key; with a mask tensor or a softcap there are none.
 4. masked_blocks up to the last key that a query sees.
 5. Divide by the sums; zeros where a query has seen no key. The logarithm of the sum, with what smoothing took from it.

V is read where it lies: float16 and bfloat16 as they are (P is rounded to the same type), float32 rounded to
bfloat16, whose range it has. The result is in memory [B, Sq, H, Dv], as that of the CPU kernels.

Constraints (`unsupported`): 8 bits, head sizes up to 256; any number of queries, keys and heads.

A V token that is not finite spoils queries of all blocks that touch it, seen or not (0 · NaN), as in torch's own
attention in plain operations; a K token: attention_prepare.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import attention_prepare, autotune
from .attention_blocks import BOOL_MASK, FLOAT_MASK, LOG2_E, NO_MASK, masked_blocks, plain_blocks
from .attention_tiles import tiles
from .numbers import capability
from .tiles import TileConfig

LN_2 = tl.constexpr(0.6931471805599453)


# Addresses do not depend on the divisibility of these: one compilation serves all lengths.
@triton.jit(
    do_not_specialize=[
        "sq",
        "skv",
        "heads",
        "group",
        "m_blocks",
        "n_blocks",
        "last_seen",
        "first_seen",
        "scale",
        "softcap",
    ]
)
def attend(
    Q, Q_SCALE, K, K_SCALE, V, MASK_PTR, SHIFT, OUT, LSE,
    sq, skv, dv, heads, group, m_blocks, n_blocks, last_seen, first_seen, scale, softcap,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, V_TAIL: tl.constexpr,
    LAST: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, HAS_LSE: tl.constexpr,
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
    if LAST:
        plain_end = tl.minimum(skv, tl.maximum(0, block * BLOCK_M + last_seen + 1))
        end = tl.minimum(skv, tl.maximum(0, (block + 1) * BLOCK_M + last_seen))
    plain_end = plain_end // BLOCK_N * BLOCK_N
    if MASK != NO_MASK or SOFTCAP:
        plain_end = 0
    shift = tl.zeros([BLOCK_M], tl.float32)
    if SOFTCAP or HAS_LSE:
        shift = tl.load(SHIFT + padded) * scale

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    plain_low, tail = 0, plain_end
    if FIRST:
        # whole blocks from the first key that the first query sees; from the first that the last query sees
        low = tl.maximum(0, block * BLOCK_M + first_seen) // BLOCK_N * BLOCK_N
        plain_low = tl.cdiv(tl.maximum(0, (block + 1) * BLOCK_M - 1 + first_seen), BLOCK_N) * BLOCK_N
        plain_low = tl.minimum(plain_low, plain_end)
        tail = tl.maximum(plain_end, low)
        if MASK == NO_MASK and not SOFTCAP:
            acc, total, top = masked_blocks(
                acc, total, top, q, q_scale, k_at, k_scale_at, v_at, columns_ok, v_stride_s, low, plain_low,
                rows, sq, skv, last_seen, first_seen, shift, softcap, mask_at, mask_rows, mask_stride_n,
                BLOCK_N, DP, LAST, FIRST, SOFTCAP, MASK,
            )  # fmt: skip
    if MASK == NO_MASK and not SOFTCAP:
        acc, total, top = plain_blocks(
            acc, total, top, q, q_scale, k_at, k_scale_at, v_at, columns_ok, v_stride_s, plain_low, plain_end,
            BLOCK_N, DP, V_TAIL,
        )  # fmt: skip
    acc, total, top = masked_blocks(
        acc, total, top, q, q_scale, k_at, k_scale_at, v_at, columns_ok, v_stride_s, tail, end,
        rows, sq, skv, last_seen, first_seen, shift * LOG2_E, softcap, mask_at, mask_rows, mask_stride_n,
        BLOCK_N, DP, LAST, FIRST, SOFTCAP, MASK,
    )  # fmt: skip

    empty = top == float("-inf")
    # NaN in the sums is not empty: top is taken of what is seen, but a maximum passes NaN over
    empty = empty & (total == 0.0)
    acc = acc * tl.where(empty, 0.0, 1.0 / total)[:, None]
    inside = rows < sq
    out_at = OUT + ((b * sq + rows)[:, None] * heads + h) * dv + columns[None, :]
    tl.store(out_at, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & columns_ok)
    if HAS_LSE:
        lse = (top + tl.math.log2(total)) * LN_2
        if not SOFTCAP:
            lse += shift
        tl.store(LSE + bh.to(tl.int64) * sq + rows, tl.where(empty, float("-inf"), lse), mask=inside)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bottom_right: bool = False,
    causal: bool = False,
    scale: float | None = None,
    return_lse: bool = False,
    tile: TileConfig | None = None,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantized_attention` in 8 bits; checked arguments.

    Args:
        q, k, v: [B, H, Sq, D], [B, Hkv, Skv, D], [B, Hkv, Skv, Dv], one float type, any strides.
        mask: a view of shape [B, H, Sq, Skv] (`expand`), bool or float; None.
        bottom_right: query i stands at position i + Skv - Sq, else at i.
        causal: it sees keys up to its position, as right=0.
        left, right: it sees keys from position - left to position + right; -1: no limit.
        softcap: c > 0 replaces a score s by c · tanh(s / c); 0 for none.
        scale: 1/√D by default.
        return_lse: also the logarithm of the softmax's denominator.
        tile: other than `autotune` chooses, which starts from `attention_tiles`.

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
    if tile is None:
        masked = mask is not None or softcap > 0 or left >= 0
        options = (
            f"{None if mask is None else mask.dtype} {causal or right >= 0} {left >= 0} {softcap > 0} {return_lse}"
        )
        sizes = f"{b}x{heads}x{kv_heads} {autotune.tokens(sq)}x{autotune.tokens(skv)} {dp}x{dvp} {q.dtype} {options}"
        stored = tiles(capability(q), max(dp, dvp), sq, masked)
        tile = autotune.choose(
            "quantized_attention", sizes, stored,
            lambda: autotune.neighbours(stored, block_m=(64, 128), block_n=(32, 64, 128), warps=(4, 8), stages=(2, 3)),
            lambda tile: attention(
                q, k, v, mask, bottom_right, causal, scale, return_lse, tile, left, right, softcap
            ), q,
        )  # fmt: skip
    x = attention_prepare.quantize(q, k, scale, tile.block_m, tile.block_n, return_lse or softcap > 0)
    v = v.to(torch.bfloat16) if v.dtype == torch.float32 else v
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    mask_ptr = x.q if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    right, offset = 0 if causal else right, skv - sq if bottom_right else 0
    m_blocks, n_blocks = x.q.shape[1] // tile.block_m, x.k_scale.shape[1]
    # an option that only NVIDIA's compiler knows: not even None may be given to another
    bound = {} if tile.registers is None else {"maxnreg": tile.registers}
    attend[(b * heads * m_blocks,)](
        x.q, x.q_scale, x.k, x.k_scale, v, mask_ptr, x.q_scale if x.shift is None else x.shift, out, lse,
        sq, skv, dv, heads, heads // kv_heads, m_blocks, n_blocks, offset + right, offset - left, scale,
        softcap or 1.0,
        *v.stride(), *((0, 0, 0, 0) if mask is None else mask.stride()),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DP=dp, DVP=dvp, V_TAIL=dv != dvp,
        LAST=right >= 0, FIRST=left >= 0, SOFTCAP=softcap > 0, MASK=kind.value, HAS_LSE=return_lse,
        num_warps=tile.warps, num_stages=tile.stages, **bound,
    )  # fmt: skip
    return out, lse
