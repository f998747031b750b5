"""Q and K of sequences laid end to end to integers: attention_prepare, with each sequence's own mean.

    q [Tq, H, D]    ->  [H, blocks · BLOCK_M, Dp] int8      scale [H, blocks · BLOCK_M]
    k [Tk, Hkv, D]  ->  [Hkv, blocks · BLOCK_N, Dp] int8    scale [Hkv, blocks]      12 bits: 2 · Dp

Blocks of attention_sequences; the scales, the padding of a sequence's last block and what is not finite are those of
attention_prepare. Blocks that no sequence has are not written, nor read.

 1. key_sums_varlen: sums of K over pieces of a sequence.
 2. quantize_varlen: a program takes a block of queries, or a block of keys less the mean of their sequence.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .attention_prepare import (
    LOG2_E,
    MOST_PIECES,
    PIECE,
    QUERY_ROWS,
    SUM_TOKENS,
    Integers,
    padded_head,
    row_bytes,
    store_keys,
    store_queries,
)
from .attention_sequences import blocks, length_of, offset_of, sequence_of, start_block
from .numbers import reciprocal, steps


@triton.jit(do_not_specialize=["tokens", "sequences", "parts"])
def key_sums_varlen(
    K, SUMS, OFFSETS, tokens, sequences, d, parts, stride_s, stride_h, stride_d,
    PIECE: tl.constexpr, TOKENS: tl.constexpr, DP: tl.constexpr,
):  # fmt: skip
    h, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    n = sequence_of(OFFSETS, part, sequences, tokens, PIECE)
    length = length_of(OFFSETS, n, sequences, tokens)
    first = (part - start_block(OFFSETS, n, sequences, tokens, PIECE)) * PIECE
    base = K + offset_of(OFFSETS, n, sequences, tokens).to(tl.int64) * stride_s + h.to(tl.int64) * stride_h
    channels = tl.arange(0, DP)
    total = tl.zeros([TOKENS, DP], tl.float32)
    for start in range(first, tl.minimum(length, first + PIECE), TOKENS):
        token = (start + tl.arange(0, TOKENS))[:, None]
        at = base + token.to(tl.int64) * stride_s + channels[None, :] * stride_d
        total += tl.load(at, mask=(token < length) & (channels[None, :] < d), other=0.0).to(tl.float32)
    if first < length:
        tl.store(SUMS + tl.program_id(0).to(tl.int64) * DP + channels, tl.sum(total, 0))


@triton.jit
def _mean_of(SUMS, OFFSETS, h, n, sequences, tokens, parts, PIECE: tl.constexpr, DP: tl.constexpr):
    """Where the sums of sequence n begin, how many there are, and 1 / its length."""
    length = length_of(OFFSETS, n, sequences, tokens)
    first = h.to(tl.int64) * parts + start_block(OFFSETS, n, sequences, tokens, PIECE)
    return SUMS + first * DP, tl.cdiv(length, PIECE), reciprocal(length.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "q_tokens", "k_tokens", "sequences", "group", "q_blocks", "k_blocks", "q_programs", "parts", "unit", "sign"
    ]
)  # fmt: skip
def quantize_varlen(
    X_Q, X_K, SUMS, OFFSETS_Q, OFFSETS_K, Q, Q_SCALE, K, K_SCALE, SHIFT,
    q_tokens, k_tokens, sequences, d, group, q_blocks, k_blocks, q_programs, parts, unit, sign,
    q_stride_s, q_stride_h, q_stride_d, k_stride_s, k_stride_h, k_stride_d,
    STEP: tl.constexpr, LOWEST: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DP: tl.constexpr, PIECE: tl.constexpr, PARTS: tl.constexpr, HAS_SHIFT: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    channels = tl.arange(0, DP)[None, :]
    if pid < q_programs:
        PER_BLOCK: tl.constexpr = BLOCK_M // ROWS
        h, piece = pid // (q_blocks * PER_BLOCK), pid % (q_blocks * PER_BLOCK)
        block = piece // PER_BLOCK
        n = sequence_of(OFFSETS_Q, block, sequences, q_tokens, BLOCK_M)
        block_in = block - start_block(OFFSETS_Q, n, sequences, q_tokens, BLOCK_M)
        length = length_of(OFFSETS_Q, n, sequences, q_tokens)
        if block_in * BLOCK_M < length:
            row = block_in * BLOCK_M + (piece % PER_BLOCK) * ROWS + tl.arange(0, ROWS)
            token = offset_of(OFFSETS_Q, n, sequences, q_tokens).to(tl.int64) + row
            at = h.to(tl.int64) * q_stride_h + token[:, None] * q_stride_s + channels * q_stride_d
            kv = h // group
            sums, own, inverse = _mean_of(SUMS, OFFSETS_K, kv, n, sequences, k_tokens, parts, PIECE, DP)
            store_queries(
                X_Q, Q, Q_SCALE, SHIFT, sums, (row < length)[:, None] & (channels < d), at,
                pid.to(tl.int64) * ROWS + tl.arange(0, ROWS), own, inverse, unit, sign, 0,
                STEP, LOWEST, DP, PARTS, HAS_SHIFT, BITS,
            )  # fmt: skip
    else:
        h, block = (pid - q_programs) // k_blocks, (pid - q_programs) % k_blocks
        n = sequence_of(OFFSETS_K, block, sequences, k_tokens, BLOCK_N)
        block_in = block - start_block(OFFSETS_K, n, sequences, k_tokens, BLOCK_N)
        length = length_of(OFFSETS_K, n, sequences, k_tokens)
        if block_in * BLOCK_N < length:
            row = block_in * BLOCK_N + tl.arange(0, BLOCK_N)
            token = offset_of(OFFSETS_K, n, sequences, k_tokens).to(tl.int64) + row
            at = h.to(tl.int64) * k_stride_h + token[:, None] * k_stride_s + channels * k_stride_d
            sums, own, inverse = _mean_of(SUMS, OFFSETS_K, h, n, sequences, k_tokens, parts, PIECE, DP)
            store_keys(
                X_K, K, K_SCALE, sums, 0, (row < length)[:, None] & (channels < d), at,
                (pid - q_programs).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N), pid - q_programs, own, inverse,
                STEP, LOWEST, DP, PARTS, BITS,
            )  # fmt: skip


def quantize(
    q: torch.Tensor,
    k: torch.Tensor,
    offsets_q: torch.Tensor,
    offsets_k: torch.Tensor,
    scale: float,
    block_m: int,
    block_n: int,
    with_shift: bool,
    bits: int = 8,
) -> Integers:
    """Q and K as integers.

    Args:
        q, k: [Tq, H, D], [Tk, Hkv, D], any float type, any strides; Tq at least 1.
        offsets_q, offsets_k: [N + 1] integers on their device.
        scale: of the scores; may be negative.
        block_m, block_n: queries and keys of a tile of the attention kernel.
        with_shift: whether the logarithm of the denominator, or a softcap, is wanted.
        bits: 8 or 12.
    """
    (q_tokens, heads, d), (k_tokens, kv_heads) = q.shape, k.shape[:2]
    dp, device, sequences = padded_head(d), q.device, len(offsets_q) - 1
    width, step, lowest = row_bytes(dp, bits), *steps(bits, True)[1:]
    rows = min(QUERY_ROWS, block_m)
    q_blocks, k_blocks = blocks(q_tokens, sequences, block_m), blocks(k_tokens, sequences, block_n)
    # a power of two: the programs of one compilation then serve lengths within a factor of two
    piece = max(PIECE, triton.next_power_of_2(triton.cdiv(k_tokens, MOST_PIECES)))
    parts = blocks(k_tokens, sequences, piece)
    most = triton.next_power_of_2(triton.cdiv(max(k_tokens, 1), piece))
    sums = torch.empty((kv_heads, parts, dp), dtype=torch.float32, device=device)
    out = Integers(
        torch.empty((heads, q_blocks * block_m, width), dtype=torch.int8, device=device),
        torch.empty((heads, q_blocks * block_m), dtype=torch.float32, device=device),
        torch.empty((kv_heads, k_blocks * block_n, width), dtype=torch.int8, device=device),
        torch.empty((kv_heads, k_blocks), dtype=torch.float32, device=device),
        torch.empty((heads, q_blocks * block_m), dtype=torch.float32, device=device) if with_shift else None,
    )
    key_sums_varlen[(kv_heads * parts,)](
        k, sums, offsets_k, k_tokens, sequences, d, parts, *k.stride(),
        PIECE=piece, TOKENS=SUM_TOKENS, DP=dp, num_warps=4,
    )  # fmt: skip
    programs = heads * q_blocks * (block_m // rows)
    quantize_varlen[(programs + kv_heads * k_blocks,)](
        q, k, sums, offsets_q, offsets_k, out.q, out.q_scale, out.k, out.k_scale,
        out.q_scale if out.shift is None else out.shift,
        q_tokens, k_tokens, sequences, d, heads // kv_heads, q_blocks, k_blocks, programs, parts, abs(scale) * LOG2_E,
        -1.0 if scale < 0 else 1.0, *q.stride(), *k.stride(),
        STEP=step, LOWEST=lowest, ROWS=rows, BLOCK_M=block_m, BLOCK_N=block_n, DP=dp,
        PIECE=piece, PARTS=most, HAS_SHIFT=with_shift, BITS=bits,
        num_warps=8 if block_n * dp >= 8192 else 4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
