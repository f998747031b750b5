"""Fused int8 attention over sequences of different lengths, laid end to end: one launch for all of them.

    q [Tq, H, D], k [Tk, Hkv, D], v [Tk, Hkv, Dv], sequence n: tokens offsets[n] to offsets[n + 1] - 1
    grid: one program a (block of BLOCK_M queries of one sequence, head); numbers of blocks: attention_sequences

 1. attention_prepare_varlen: mean of K of each sequence, integers of Q and K, two launches.
 2. Find the sequence. Blocks that no sequence has end here.
 3. attend_rows and quotient, as the dense kernel, on that sequence's queries and keys.

The host looks at shapes alone, so that nothing waits for the GPU and a CUDA graph can hold it while lengths change.
Queries behind the last offset see no key: zeros.

Constraints (`unsupported`): as `attention`, and no mask tensor.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import attention_prepare_varlen, autotune
from .attention_blocks import NO_MASK
from .attention_prepare import padded_head
from .attention_rows import attend_rows, quotient
from .attention_sequences import blocks, length_of, offset_of, sequence_of, start_block
from .attention_tiles import candidates, tiles
from .attention_values import padded_values
from .numbers import capability
from .tiles import TileConfig


@triton.jit(
    do_not_specialize=[
        "q_tokens", "k_tokens", "sequences", "heads", "group", "m_blocks", "n_blocks", "left", "right", "scale",
        "softcap",
    ]
)  # fmt: skip
def attend_varlen(
    Q, Q_SCALE, K, K_SCALE, V, SHIFT, OFFSETS_Q, OFFSETS_K, OUT, LSE,
    q_tokens, k_tokens, sequences, dv, heads, group, m_blocks, n_blocks, left, right, scale, softcap,
    v_stride_s, v_stride_h, v_stride_d,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, V_TAIL: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr, LAST: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr, ONES: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    block, h = m_blocks - 1 - pid % m_blocks, (pid // m_blocks).to(tl.int64)
    kv = h // group
    n = sequence_of(OFFSETS_Q, block, sequences, q_tokens, BLOCK_M)
    first = (block - start_block(OFFSETS_Q, n, sequences, q_tokens, BLOCK_M)) * BLOCK_M
    sq = length_of(OFFSETS_Q, n, sequences, q_tokens)
    if first >= sq:
        return
    token = offset_of(OFFSETS_Q, n, sequences, q_tokens).to(tl.int64) + first
    k_token = offset_of(OFFSETS_K, n, sequences, k_tokens).to(tl.int64)
    skv = tl.where(n < sequences, length_of(OFFSETS_K, n, sequences, k_tokens), 0)
    k_block = kv * n_blocks + start_block(OFFSETS_K, n, sequences, k_tokens, BLOCK_N)
    position = first
    if BOTTOM_RIGHT:
        position += skv - sq

    rows, keys = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    channels, columns = tl.arange(0, DP), tl.arange(0, DVP)
    padded = (h * m_blocks + block) * BLOCK_M
    ROW: tl.constexpr = DP if BITS == 8 else 2 * DP
    q_at = Q + padded * ROW + (rows[:, None] * ROW + channels[None, :])
    q = tl.load(q_at)
    q_low = tl.load(q_at + DP) if BITS == 12 else q
    q_scale = tl.load(Q_SCALE + padded + rows)
    k_at = K + k_block * (BLOCK_N * ROW) + (keys[:, None] * ROW + channels[None, :])
    v_at = V + k_token * v_stride_s + kv * v_stride_h
    v_at = v_at + keys[:, None] * v_stride_s + columns[None, :] * v_stride_d
    columns_ok = (columns < dv)[None, :]
    shift = tl.zeros([BLOCK_M], tl.float32)
    if SOFTCAP:
        shift = tl.load(SHIFT + padded + rows) * scale

    acc, total, top = attend_rows(
        q, q_low, q_scale, k_at, K_SCALE + k_block, v_at, columns_ok, v_stride_s, rows, sq - first, skv,
        position + right, position - left, shift, softcap, Q, rows[:, None], 0,
        BLOCK_M, BLOCK_N, DP, DVP, V_TAIL, LAST, FIRST, SOFTCAP, NO_MASK, ONES, False, BITS,
    )  # fmt: skip
    acc, log = quotient(acc, total, top, False)

    inside = rows < sq - first
    # as in the dense kernel, 32 bits within a tile
    out_at = OUT + (token * heads + h) * dv + (rows[:, None] * (heads * dv) + columns[None, :])
    tl.store(out_at, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & columns_ok)
    if HAS_LSE:
        if not SOFTCAP:
            shifted = log + tl.load(SHIFT + padded + rows) * scale
            log = tl.where(log == float("-inf"), log, shifted)  # a shift may be NaN
        tl.store(LSE + (h * q_tokens + token) + rows, log, mask=inside)


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    bottom_right: bool = False,
    left: int = -1,
    right: int = -1,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
    tile: TileConfig | None = None,
    bits: int = 8,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantized_attention_varlen` in 8 or 12 bits; checked arguments.

    Args:
        q, k, v: [Tq, H, D], [Tk, Hkv, D], [Tk, Hkv, Dv], one float type, any strides.
        cu_seqlens_q, cu_seqlens_k: [N + 1] int32 or int64; for a CUDA graph on q's device. What they hold is not
            looked at: see attention_sequences.
        bottom_right, left, right, softcap, scale, return_lse, tile, bits: as in `attention`.

    Returns:
        [Tq, H, Dv] in the type of q, and [H, Tq] float32, empty unless asked for.
    """
    (q_tokens, heads, d), (k_tokens, kv_heads, dv), sequences = q.shape, v.shape, len(cu_seqlens_q) - 1
    scale = 1.0 / max(d, 1) ** 0.5 if scale is None else scale
    out = torch.empty((q_tokens, heads, dv), dtype=q.dtype, device=q.device)
    lse = torch.empty((heads, q_tokens) if return_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    if k_tokens == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.to(q.device), cu_seqlens_k.to(q.device)
    dp, dvp = padded_head(d), padded_values(dv)
    if tile is None:
        average = q_tokens // max(sequences, 1)
        options = f"{right >= 0} {left >= 0} {softcap > 0} {return_lse} {bits}"
        sizes = (
            f"{heads}x{kv_heads} {autotune.tokens(q_tokens)}:{autotune.tokens(k_tokens)}:{autotune.tokens(sequences)}"
        )
        stored = tiles(capability(q), max(dp, dvp), average, softcap > 0 or left >= 0, bits=bits, sequences=True)
        tile = autotune.choose(
            "quantized_attention_varlen", f"{sizes} {dp}x{dvp} {q.dtype} {options}", stored,
            lambda: candidates(stored),
            lambda tile: attention_varlen(
                q, k, v, cu_seqlens_q, cu_seqlens_k, bottom_right, left, right, softcap, scale, return_lse, tile,
                bits,
            ), q,
        )  # fmt: skip
    x = attention_prepare_varlen.quantize(
        q, k, cu_seqlens_q, cu_seqlens_k, scale, tile.block_m, tile.block_n, return_lse or softcap > 0, bits
    )
    v = v.to(torch.bfloat16) if v.dtype == torch.float32 else v
    m_blocks, n_blocks = blocks(q_tokens, sequences, tile.block_m), x.k_scale.shape[1]
    # an option that only NVIDIA's compiler knows: not even None may be given to another
    bound = {} if tile.registers is None else {"maxnreg": tile.registers}
    attend_varlen[(heads * m_blocks,)](
        x.q, x.q_scale, x.k, x.k_scale, v, x.q_scale if x.shift is None else x.shift, cu_seqlens_q, cu_seqlens_k,
        out, lse, q_tokens, k_tokens, sequences, dv, heads, heads // kv_heads, m_blocks, n_blocks, left, right, scale,
        softcap or 1.0, *v.stride(),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, DP=dp, DVP=dvp, V_TAIL=dv != dvp, BOTTOM_RIGHT=bottom_right,
        LAST=right >= 0, FIRST=left >= 0, SOFTCAP=softcap > 0, HAS_LSE=return_lse, ONES=tile.ones,
        BITS=bits,
        num_warps=tile.warps, num_stages=tile.stages, **bound,
    )  # fmt: skip
    return out, lse
