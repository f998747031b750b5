"""What a program of the attention kernels does with its block of queries: which keys it takes in which loop, and the
quotient at the end. The dense kernel and the one for sequences laid end to end differ in where their tensors begin.

    keys   0 ........ low ....... plain low ................ plain end ............ end ....... Skv
           | skipped  | left edge  | every query sees every key | diagonal or tail  |  skipped   |
           |          | masked     | plain_blocks               | masked_blocks     |            |
"""

from __future__ import annotations

import triton
import triton.language as tl

from .attention_blocks import LOG2_E, LOG2_P, NO_MASK, SUMS, masked_blocks, plain_blocks

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def attend_rows(
    q, q_low, q_scale, k_at, k_scale_at, v_at, columns_ok, stride_v, rows, sq, skv, last_seen, first_seen,
    shift, softcap, mask_at, mask_rows, stride_mask_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, V_TAIL: tl.constexpr,
    LAST: tl.constexpr, FIRST: tl.constexpr, SOFTCAP: tl.constexpr, MASK: tl.constexpr, ONES: tl.constexpr,
    INT8_V: tl.constexpr, BITS: tl.constexpr,
):  # fmt: skip
    """Output [BLOCK_M, DVP], sum [BLOCK_M] and maximum [BLOCK_M] of rows that see keys from row + first_seen to
    row + last_seen. The rows count from the block's first, so that a thread can compute its own anew: held through the
    loop they were what spilled on 9.0."""
    # the first key that the first row does not see, and the one after the last that the last row does
    plain_end, end = skv, skv
    if LAST:
        plain_end = tl.minimum(skv, tl.maximum(0, last_seen + 1))
        end = tl.minimum(skv, tl.maximum(0, BLOCK_M + last_seen))
    plain_end = plain_end // BLOCK_N * BLOCK_N
    if MASK != NO_MASK or SOFTCAP:
        plain_end = 0

    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    plain_low, tail = 0, plain_end
    if FIRST:
        # whole blocks from the first key that the first row sees; from the first that the last row sees
        low = tl.maximum(0, first_seen) // BLOCK_N * BLOCK_N
        plain_low = tl.cdiv(tl.maximum(0, BLOCK_M - 1 + first_seen), BLOCK_N) * BLOCK_N
        plain_low = tl.minimum(plain_low, plain_end)
        tail = tl.maximum(plain_end, low)
        if MASK == NO_MASK and not SOFTCAP:
            acc, total, top = masked_blocks(
                acc, total, top, q, q_low, q_scale, k_at, k_scale_at, v_at, columns_ok, stride_v, low, plain_low,
                rows, sq, skv, last_seen, first_seen, shift, softcap, mask_at, mask_rows, stride_mask_n,
                BLOCK_N, DP, LAST, FIRST, SOFTCAP, MASK, INT8_V, BITS,
            )  # fmt: skip
    if MASK == NO_MASK and not SOFTCAP:
        sums = total
        if ONES:
            sums = tl.broadcast_to(total[:, None], [BLOCK_M, SUMS])
        acc, sums, top = plain_blocks(
            acc, sums, top, q, q_low, q_scale, k_at, k_scale_at, v_at, columns_ok, stride_v, plain_low, plain_end,
            BLOCK_N, DP, V_TAIL, ONES, INT8_V, BITS,
        )  # fmt: skip
        total = sums
        if ONES:
            total = tl.sum(sums, 1) * (1.0 / SUMS)  # exact: equal columns
    acc, total, top = masked_blocks(
        acc, total, top, q, q_low, q_scale, k_at, k_scale_at, v_at, columns_ok, stride_v, tail, end,
        rows, sq, skv, last_seen, first_seen, shift * LOG2_E, softcap, mask_at, mask_rows, stride_mask_n,
        BLOCK_N, DP, LAST, FIRST, SOFTCAP, MASK, INT8_V, BITS,
    )  # fmt: skip
    return acc, total, top


@triton.jit
def quotient(acc, total, top, INT8_V: tl.constexpr):
    """The output divided by its sums, zeros where a row has seen no key, and the logarithm of the sums."""
    empty = top == float("-inf")
    # NaN in the sums is not empty: top is taken of what is seen, but a maximum passes NaN over
    empty = empty & (total == 0.0)
    log = (top + tl.math.log2(total)) * LN_2
    if INT8_V:
        log -= LOG2_P * LN_2
    return acc * tl.where(empty, 0.0, 1.0 / total)[:, None], tl.where(empty, float("-inf"), log)
