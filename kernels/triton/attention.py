"""Fused int8 attention: softmax(scale · q kᵀ + mask) v, Q and K in int8, or in 12 bits as two bytes, P and V in
16-bit floats, or in int8 too.

    grid: one program a (block of BLOCK_M queries, head), the last block first: with a causal mask it has the most to do

 1. attention_prepare: mean of K, integers of Q and K, two launches. With value_bits=8 attention_values: two more.
 2. Load the block of Q, which stays.
 3. attend_rows: the loops over blocks of keys that some of the queries see.
 4. quotient: divide by the sums; zeros where a query has seen no key. The logarithm of the sum, with what smoothing
    took from it.

V is read where it lies: float16 and bfloat16 as they are (P is rounded to the same type), float32 rounded to
bfloat16, whose range it has. The result is in memory [B, Sq, H, Dv], as that of the CPU kernels.

Constraints (`unsupported`): 8 or 12 bits, head sizes up to 256; any number of queries, keys and heads.

A V token that is not finite spoils queries of all blocks that touch it, seen or not (0 · NaN), as in torch's own
attention in plain operations, and with value_bits=8 its channel of all queries; a K token: attention_prepare.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import attention_prepare, attention_values, autotune
from .attention_blocks import BOOL_MASK, FLOAT_MASK, NO_MASK
from .attention_rows import attend_rows, quotient
from .attention_tiles import candidates, tiles
from .numbers import capability
from .tiles import TileConfig


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
    Q, Q_SCALE, K, K_SCALE, V, V_SCALE, MASK_PTR, SHIFT, OUT, LSE,
    sq, skv, dv, heads, group, m_blocks, n_blocks, last_seen, first_seen, scale, softcap,
    v_stride_b, v_stride_h, v_stride_s, v_stride_d,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, V_TAIL: tl.constexpr,
    LAST: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, HAS_LSE: tl.constexpr,
    ONES: tl.constexpr, INT8_V: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    # 1D: the other axes of a grid end at 65535
    pid = tl.program_id(0)
    first = (m_blocks - 1 - pid % m_blocks) * BLOCK_M
    bh = pid // m_blocks
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    kv = b * (heads // group) + h // group

    # within a tile 32 bits are enough, and half the registers
    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    channels, columns = tl.arange(0, DP), tl.arange(0, DVP)
    padded = bh.to(tl.int64) * (m_blocks * BLOCK_M) + first
    ROW: tl.constexpr = DP if BITS == 8 else 2 * DP
    q_at = Q + padded * ROW + (rows[:, None] * ROW + channels[None, :])
    q = tl.load(q_at)
    q_low = tl.load(q_at + DP) if BITS == 12 else q
    q_scale = tl.load(Q_SCALE + padded + rows)
    k_at = K + kv * n_blocks * (BLOCK_N * ROW) + (keys[:, None] * ROW + channels[None, :])
    if INT8_V:
        v_at = V + (kv * DVP + columns)[:, None] * (n_blocks * BLOCK_N) + keys[None, :]
    else:
        v_at = V + b * v_stride_b + (h // group) * v_stride_h
        v_at = v_at + keys[:, None] * v_stride_s + columns[None, :] * v_stride_d
    columns_ok = (columns < dv)[None, :]
    mask_at = MASK_PTR + b * mask_stride_b + h * mask_stride_h + first.to(tl.int64) * mask_stride_m
    mask_rows = rows[:, None] * mask_stride_m
    shift = tl.zeros([BLOCK_M], tl.float32)
    if SOFTCAP:
        shift = tl.load(SHIFT + padded + rows) * scale

    acc, total, top = attend_rows(
        q, q_low, q_scale, k_at, K_SCALE + kv * n_blocks, v_at, columns_ok, v_stride_s, rows, sq - first, skv,
        last_seen + first, first_seen + first, shift, softcap, mask_at, mask_rows, mask_stride_n,
        BLOCK_M, BLOCK_N, DP, DVP, V_TAIL, LAST, FIRST, SOFTCAP, MASK, ONES, INT8_V, BITS,
    )  # fmt: skip
    acc, log = quotient(acc, total, top, INT8_V)

    if INT8_V:
        scaled = acc * tl.load(V_SCALE + kv * DVP + columns)[None, :]
        acc = tl.where((log == float("-inf"))[:, None], 0.0, scaled)  # a scale may be NaN
    inside = rows < sq - first
    # a tile's tokens are heads · dv apart: 32 bits do up to 65535 heads of 256
    out_at = OUT + ((b * sq + first) * heads + h) * dv + (rows[:, None] * (heads * dv) + columns[None, :])
    tl.store(out_at, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & columns_ok)
    if HAS_LSE:
        if not SOFTCAP:
            shifted = log + tl.load(SHIFT + padded + rows) * scale
            log = tl.where(log == float("-inf"), log, shifted)  # a shift may be NaN
        tl.store(LSE + (bh.to(tl.int64) * sq + first) + rows, log, mask=inside)


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
    value_bits: int = 16,
    bits: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantized_attention` in 8 or 12 bits; checked arguments.

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
        value_bits: 16: P and V in 16-bit floats. 8: in int8, V with a scale for each channel and P for each row of a
            block of keys; half the work of the second product, at 1.6 times the error (docs/gpu.md).
        bits: of Q and K. 8: one byte. 12: two, four times the work of the first product, at a tenth of the error.

    Returns:
        [B, H, Sq, Dv] in the type of q, and [B, H, Sq] float32, empty unless asked for.

    Raises:
        ValueError: bits is neither 8 nor 12, value_bits neither 8 nor 16, or 8 beside 12 bits of Q and K.
    """
    if bits not in (8, 12):
        raise ValueError(f"attention: bits: got {bits}, expected 8 or 12")
    if value_bits not in (8, 16) or (bits == 12 and value_bits == 8):
        raise ValueError(f"attention: value_bits: got {value_bits} with bits={bits}, expected 16, or 8 with bits=8")
    b, heads, sq, d = q.shape
    kv_heads, skv, dv = k.shape[1], k.shape[2], v.shape[3]
    scale = 1.0 / max(d, 1) ** 0.5 if scale is None else scale
    out = torch.empty((b, sq, heads, dv), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((b, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    if skv == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    dp, dvp = attention_prepare.padded_head(d), attention_values.padded_values(dv)
    if tile is None:
        masked = mask is not None or softcap > 0 or left >= 0
        options = (
            f"{None if mask is None else mask.dtype} {causal or right >= 0} {left >= 0} {softcap > 0} {return_lse}"
            f" {value_bits} {bits}"
        )
        sizes = f"{b}x{heads}x{kv_heads} {autotune.tokens(sq)}x{autotune.tokens(skv)} {dp}x{dvp} {q.dtype} {options}"
        stored = tiles(capability(q), max(dp, dvp), sq, masked, value_bits, bits)
        tile = autotune.choose(
            "quantized_attention", sizes, stored,
            lambda: candidates(stored),
            lambda tile: attention(
                q, k, v, mask, bottom_right, causal, scale, return_lse, tile, left, right, softcap, value_bits,
                bits,
            ), q,
        )  # fmt: skip
    x = attention_prepare.quantize(q, k, scale, tile.block_m, tile.block_n, return_lse or softcap > 0, bits)
    v_scale = x.k_scale
    if value_bits == 8:
        v, v_scale = attention_values.quantize_values(v, tile.block_n)
    elif v.dtype == torch.float32:
        v = v.to(torch.bfloat16)
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    mask_ptr = x.q if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    right, offset = 0 if causal else right, skv - sq if bottom_right else 0
    m_blocks, n_blocks = x.q.shape[1] // tile.block_m, x.k_scale.shape[1]
    # an option that only NVIDIA's compiler knows: not even None may be given to another
    bound = {} if tile.registers is None else {"maxnreg": tile.registers}
    attend[(b * heads * m_blocks,)](
        x.q, x.q_scale, x.k, x.k_scale, v, v_scale, mask_ptr, x.q_scale if x.shift is None else x.shift, out, lse,
        sq, skv, dv, heads, heads // kv_heads, m_blocks, n_blocks, offset + right, offset - left, scale,
        softcap or 1.0,
        *((0, 0, 0, 0) if value_bits == 8 else v.stride()), *((0, 0, 0, 0) if mask is None else mask.stride()),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DP=dp, DVP=dvp, V_TAIL=dv != dvp,
        LAST=right >= 0, FIRST=left >= 0, SOFTCAP=softcap > 0, MASK=kind.value, HAS_LSE=return_lse,
        ONES=tile.ones, INT8_V=value_bits == 8, BITS=bits,
        num_warps=tile.warps, num_stages=tile.stages, **bound,
    )  # fmt: skip
    return out, lse
