"""Attention of few queries over the int8 key-value cache, the tokens split over programs; the op `kv_cache_attention`.

    cache of one head, blocks of 64 tokens (tcompress/packing/kv_cache.py)
        keys    [4 panels][D/4][16 tokens][4 channels]       a panel is read as it lies, and turned in registers
        values  [Dv/16][16 quads][16 channels][4 tokens]

    rows of a tile: the queries of all heads that share a head of keys, query by query; the cache is read once for them
        row = query · group + head within the group

    blocks of tokens   first ....... | ............ | ....... end
                       split 0         split 1        split 2        one program each, then decode_reduce

 1. Quantize the rows of Q as `quantize_per_token` does; q · k_mean for the softcap and the logarithm.
 2. For each block: integers Q Kᵀ, times both scales; softcap, mask, window; the blockwise softmax.
 3. P times a value's scale relative to the largest of its block, in float16, times V, which float16 holds exactly.
 4. One split: divide and store. Else store maximum, sum and output of the part; decode_reduce puts them together.

The integers and scores before the softcap are those of the op's reference. A token of the cache whose scale is NaN
spoils the queries that see it, and no other.

Constraints (`unsupported`): head sizes up to 256; any number of queries, heads, and tokens.

Papers: Dao et al. (Flash-Decoding), crfm.stanford.edu/2023/10/12/flashdecoding.html; Milakov & Gimelshein, arXiv
1805.02867, section 3.1.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import autotune
from .attention_blocks import BOOL_MASK, FLOAT_MASK, LOG2_E, LOWEST_MASK, NO_MASK, softcapped
from .numbers import all_finite, capability, reciprocal, round_half_even, steps
from .tiles import PROCESSORS, TileConfig, TileTable

LN_2 = tl.constexpr(0.6931471805599453)
#: Tokens of a block of the cache.
BLOCK_N = tl.constexpr(64)
TOKENS_A_BLOCK = 64
#: A split should have so many blocks: with fewer, putting the parts together is more than reading them.
LEAST_BLOCKS = 4
MOST_SPLITS = 128
CHUNK = 8
_, STEP, LOWEST = steps(8, True)


@triton.jit
def _load_keys(K, panel_bytes, DP: tl.constexpr, WHOLE: tl.constexpr):
    """A block of keys, [64 tokens, DP]."""
    at = tl.arange(0, 16 * DP)[None, :]
    ptr = K + tl.arange(0, 4)[:, None] * panel_bytes + at
    k = tl.load(ptr) if WHOLE else tl.load(ptr, mask=at < panel_bytes, other=0)
    k = tl.permute(tl.reshape(k, [4, DP // 4, 16, 4]), (0, 2, 1, 3))
    return tl.reshape(k, [64, DP])


@triton.jit
def _load_values(V, value_bytes, DVP: tl.constexpr, WHOLE: tl.constexpr):
    """A block of values, [64 tokens, DVP]."""
    at = tl.arange(0, 64 * DVP)
    v = tl.load(V + at) if WHOLE else tl.load(V + at, mask=at < value_bytes, other=0)
    v = tl.permute(tl.reshape(v, [DVP // 16, 16, 16, 4]), (1, 3, 0, 2))
    return tl.reshape(v, [64, DVP])


@triton.jit
def _finish(acc, total, top, shift, OUT, LSE, at_out, at_lse, inside, columns_ok, HAS_LSE: tl.constexpr):
    empty = (top == float("-inf")) & (total == 0.0)
    y = acc * tl.where(empty, 0.0, 1.0 / total)[:, None]
    tl.store(OUT + at_out, y.to(OUT.dtype.element_ty), mask=inside[:, None] & columns_ok)
    if HAS_LSE:
        lse = (top + tl.math.log2(total)) * LN_2 + shift
        tl.store(LSE + at_lse, tl.where(empty, float("-inf"), lse), mask=inside)


# Positions and lengths grow token by token: compiling for each that divides by 16 would compile twice.
@triton.jit(
    do_not_specialize=[
        "sq", "heads", "group", "length", "room", "first", "end", "part", "splits", "offset", "left", "right",
        "unit", "sign", "scale", "softcap",
    ]
)  # fmt: skip
def decode_split(
    Q, K, K_SCALE, V, V_SCALE, K_MEAN, MASK_PTR, OUT, LSE, PARTIAL, STATE,
    sq, d, dv, heads, group, length, room, first, end, part, splits, offset, left, right, unit, sign, scale, softcap,
    panel_bytes, value_bytes, q_stride_b, q_stride_h, q_stride_s, q_stride_d,
    mask_stride_b, mask_stride_h, mask_stride_m, mask_stride_n,
    BLOCK_M: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, WHOLE_K: tl.constexpr, WHOLE_V: tl.constexpr,
    MASK: tl.constexpr, WINDOW_LEFT: tl.constexpr, WINDOW_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr, HAS_LSE: tl.constexpr, STEP: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    split, tile = pid % splits, pid // splits
    row_blocks = tl.cdiv(sq * group, BLOCK_M)
    kv, kv_heads = (tile // row_blocks).to(tl.int64), heads // group
    b, kv_head = kv // kv_heads, kv % kv_heads
    rows = (tile % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    query, head = rows // group, kv_head * group + rows % group
    inside = rows < sq * group
    channels, columns = tl.arange(0, DP)[None, :], tl.arange(0, DVP)[None, :]

    q_at = b * q_stride_b + head * q_stride_h + query.to(tl.int64) * q_stride_s
    q_at = q_at[:, None] + channels.to(tl.int64) * q_stride_d
    x = tl.load(Q + q_at, mask=inside[:, None] & (channels < d), other=0.0).to(tl.float32)
    ok = all_finite(x, 1)
    step = tl.maximum(tl.max(tl.abs(x), 1) * STEP, LOWEST)
    inverse = tl.where(ok, reciprocal(step), 0.0)
    q = (round_half_even(tl.where(ok[:, None], x, 0.0) * inverse[:, None]) * sign).to(tl.int8)
    q_scale = tl.where(ok, step * unit, float("nan"))
    shift = tl.zeros([BLOCK_M], tl.float32)
    if SOFTCAP or HAS_LSE:
        mean = tl.load(K_MEAN + kv * d + channels, mask=channels < d, other=0.0)
        shift = tl.sum(x * mean, 1) * scale

    position = query + offset
    low, high = first + split * part, tl.minimum(end, first + (split + 1) * part)
    block_bytes = 4 * panel_bytes
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, DVP], tl.float32)
    for block in range(low, high):
        slot = kv * room + block
        keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
        k = _load_keys(K + slot * block_bytes, panel_bytes, DP, WHOLE_K)
        v = _load_values(V + slot * value_bytes, value_bytes, DVP, WHOLE_V)
        stored = keys < length
        k_scale = tl.load(K_SCALE + slot * BLOCK_N + tl.arange(0, BLOCK_N), mask=stored, other=0.0)
        v_scale = tl.load(V_SCALE + slot * BLOCK_N + tl.arange(0, BLOCK_N), mask=stored, other=0.0)
        # a value that is not finite spoils its score: a weight of 0 would not keep NaN away from who does not see it
        v_ok = v_scale == v_scale
        k_scale = tl.where(v_ok, k_scale, float("nan"))
        v_scale = tl.where(v_ok, v_scale, 0.0)
        largest = tl.max(v_scale, 0)
        s = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32) * k_scale[None, :] * q_scale[:, None]
        if SOFTCAP:
            s = softcapped(s + (shift * LOG2_E)[:, None], softcap)
        seen = stored[None, :] & inside[:, None]
        if WINDOW_RIGHT:
            seen = seen & (keys[None, :] <= (position + right)[:, None])
        if WINDOW_LEFT:
            seen = seen & (keys[None, :] >= (position - left)[:, None])
        if MASK != NO_MASK:
            mask_at = b * mask_stride_b + head * mask_stride_h + query.to(tl.int64) * mask_stride_m
            mask_at = mask_at[:, None] + keys.to(tl.int64)[None, :] * mask_stride_n
            entry = tl.load(MASK_PTR + mask_at, mask=stored[None, :] & inside[:, None], other=0)
            if MASK == BOOL_MASK:
                seen = seen & (entry != 0)
            else:
                added = entry.to(tl.float32)
                seen = seen & (added != float("-inf"))
                s = s + tl.where(added * LOG2_E < LOWEST_MASK, LOWEST_MASK, added * LOG2_E)
        s = tl.where(seen, s, float("-inf"))
        new = tl.maximum(top, tl.max(s, 1))
        floor = tl.where(new == float("-inf"), 0.0, new)
        p = tl.math.exp2(s - floor[:, None])
        keep = tl.math.exp2(top - floor)
        weight = v_scale * tl.where(largest > 0, 1.0 / largest, 0.0)
        values = tl.dot((p * weight[None, :]).to(tl.float16), v.to(tl.float16), out_dtype=tl.float32)
        total = total * keep + tl.sum(p, 1)
        acc = acc * keep[:, None] + values * largest
        top = new

    if SPLIT:
        row = (split * (tl.num_programs(0) // splits) + tile).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(PARTIAL + row[:, None] * DVP + columns, acc)
        tl.store(STATE + row * 3, top)
        tl.store(STATE + row * 3 + 1, total)
        tl.store(STATE + row * 3 + 2, shift)
    else:
        at_out = ((b * sq + query) * heads + head)[:, None] * dv + columns
        at_lse = (b * heads + head) * sq + query
        lse_shift = shift * (0.0 if SOFTCAP else 1.0)
        _finish(acc, total, top, lse_shift, OUT, LSE, at_out, at_lse, inside, columns < dv, HAS_LSE)


@triton.jit(do_not_specialize=["sq", "heads", "group", "splits", "padded"])
def decode_reduce(
    PARTIAL, STATE, OUT, LSE, sq, dv, heads, group, splits, padded,
    DVP: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr, BLOCK_M: tl.constexpr, SOFTCAP: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """One row of the output; `padded` rows of each split, BLOCK_M a tile."""
    pid = tl.program_id(0)
    kv, row = (pid // (sq * group)).to(tl.int64), pid % (sq * group)
    row_blocks = tl.cdiv(sq * group, BLOCK_M)
    kv_heads = heads // group
    b, query = kv // kv_heads, row // group
    head = (kv % kv_heads) * group + row % group
    first = (kv * row_blocks + row // BLOCK_M) * BLOCK_M + row % BLOCK_M
    split = tl.arange(0, SPLITS)
    at = (first + split.to(tl.int64) * padded) * 3
    tops = tl.load(STATE + at, mask=split < splits, other=float("-inf"))
    totals = tl.load(STATE + at + 1, mask=split < splits, other=0.0)
    top = tl.max(tops, 0)
    floor = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.math.exp2(tops - floor), 0)
    columns = tl.arange(0, DVP)
    acc = tl.zeros([DVP], tl.float32)
    for start in range(0, splits, CHUNK):
        one = start + tl.arange(0, CHUNK)
        at_one = first + one.to(tl.int64) * padded
        share = tl.math.exp2(tl.load(STATE + at_one * 3, mask=one < splits, other=float("-inf")) - floor)
        part = tl.load(PARTIAL + at_one[:, None] * DVP + columns[None, :], mask=(one < splits)[:, None], other=0.0)
        acc += tl.sum(part * share[:, None], 0)
    shift = tl.load(STATE + first * 3 + 2) * (0.0 if SOFTCAP else 1.0)
    empty = (top == float("-inf")) & (total == 0.0)
    y = acc * tl.where(empty, 0.0, 1.0 / total)
    at_out = ((b * sq + query) * heads + head) * dv + columns
    tl.store(OUT + at_out, y.to(OUT.dtype.element_ty), mask=columns < dv)
    if HAS_LSE:
        lse = (top + tl.math.log2(total)) * LN_2 + shift
        tl.store(LSE + (b * heads + head) * sq + query, tl.where(empty, float("-inf"), lse))


TILES = TileTable(
    "decode",
    {
        "16 rows": TileConfig(16, TOKENS_A_BLOCK, warps=4, stages=3),
        "32 rows": TileConfig(32, TOKENS_A_BLOCK, warps=4, stages=3),
        "32 rows, long": TileConfig(32, TOKENS_A_BLOCK, warps=8, stages=3),
        "64 rows": TileConfig(64, TOKENS_A_BLOCK, warps=4, stages=3),
        "64 rows, long": TileConfig(64, TOKENS_A_BLOCK, warps=8, stages=3),
    },
)


def decode_tile(capability: int, rows: int, head: int, tiles: int, blocks: int) -> TileConfig:
    """For `rows` queries and heads that share a head of keys, the larger head size, so many heads of keys in all, and
    blocks of tokens. By rule, not measured; chosen so that nothing spills."""
    block_m = 16 if rows <= 16 else 32 if rows <= 32 or head > 128 else 64
    tiles *= -(-rows // block_m)
    split = min(-(-2 * PROCESSORS // max(tiles, 1)), -(-blocks // LEAST_BLOCKS), MOST_SPLITS)
    role = f"{block_m} rows" + (", long" if block_m * head > 4096 else "")
    return replace(TILES.tile(capability, role), split=max(split, 1))


def _candidates(stored: TileConfig) -> list[TileConfig]:
    return autotune.neighbours(stored, warps=(4, 8), stages=(2, 3, 4), split=(1, 2, 4, 8, 16, 32, 64, MOST_SPLITS))


def kv_cache_attention(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    mask: torch.Tensor | None,
    length: int,
    head_dim_v: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
    tile: TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The op of the same name; checked arguments, as its schema has them.

    Args:
        q: [B, H, Sq, D], any float type, any strides.
        k_data, k_scale, v_data, v_scale, k_mean: the cache, contiguous; see `tcompress.ops.kv_cache_append`.
        mask: a view of shape [B, H, Sq, length] (`expand`), bool or float; None.
        length, head_dim_v: tokens in the cache, Dv.
        bottom_right, left, right: which keys a query sees (`attention_reference.Visible`); -1: no limit.
        softcap: 0 for none.
        tile: other than `autotune` chooses, which starts from `decode_tile`.

    Returns:
        [B, H, Sq, Dv] in the type of q, in memory [B, Sq, H, Dv], and [B, H, Sq] float32, empty unless asked for.
    """
    b, heads, sq, d = q.shape
    kv_heads, room, dv = k_data.shape[1], k_data.shape[2], head_dim_v
    out = torch.empty((b, sq, heads, dv), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((b, heads, sq) if return_lse else (0,), dtype=torch.float32, device=q.device)
    if out.numel() == 0 and lse.numel() == 0:
        return out, lse
    offset = length - sq if bottom_right else 0
    lowest = 0 if left < 0 else max(0, offset - left)
    highest = length if right < 0 else min(length, sq + offset + right)
    first, end = lowest // TOKENS_A_BLOCK, -(-max(highest, 0) // TOKENS_A_BLOCK)
    if end <= first:
        return out.zero_(), lse.fill_(-math.inf)
    group = heads // kv_heads
    if tile is None:
        options = f"{mask is not None} {left >= 0} {right >= 0} {softcap > 0} {return_lse}"
        sizes = f"{b}x{kv_heads}x{autotune.tokens(end - first)} {sq * group}x{d}x{dv} {q.dtype} {options}"
        arguments = (q, k_data, k_scale, v_data, v_scale, k_mean, mask, length, dv, bottom_right, left, right)
        stored = decode_tile(capability(q), sq * group, max(d, dv), b * kv_heads, end - first)
        tile = autotune.choose(
            "kv_cache_attention", sizes, stored, lambda: _candidates(stored),
            lambda tile: kv_cache_attention(*arguments, softcap, scale, return_lse, tile), q,
        )  # fmt: skip
    part = triton.cdiv(end - first, tile.split)
    splits = triton.cdiv(end - first, part)
    tiles = b * kv_heads * triton.cdiv(sq * group, tile.block_m)
    dp, dvp = max(32, triton.next_power_of_2(d)), max(16, triton.next_power_of_2(max(dv, 1)))
    partial = state = lse
    if splits > 1:
        padded = tiles * tile.block_m
        partial = torch.empty((splits, padded, dvp), dtype=torch.float32, device=q.device)
        state = torch.empty((splits, padded, 3), dtype=torch.float32, device=q.device)
    kind = NO_MASK if mask is None else BOOL_MASK if mask.dtype == torch.bool else FLOAT_MASK
    mask_ptr = k_data if mask is None else mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    panel_bytes, value_bytes = k_data.shape[3] // 4, v_data.shape[3]
    decode_split[(tiles * splits,)](
        q, k_data, k_scale, v_data, v_scale, k_mean, mask_ptr, out, lse, partial, state,
        sq, d, dv, heads, group, length, room, first, end, part, splits, offset, left, right,
        abs(scale) * math.log2(math.e), -1.0 if scale < 0 else 1.0, scale, softcap or 1.0, panel_bytes, value_bytes,
        *q.stride(), *((0, 0, 0, 0) if mask is None else mask.stride()),
        BLOCK_M=tile.block_m, DP=dp, DVP=dvp, WHOLE_K=panel_bytes == 16 * dp, WHOLE_V=value_bytes == 64 * dvp,
        MASK=kind.value, WINDOW_LEFT=left >= 0, WINDOW_RIGHT=right >= 0, SOFTCAP=softcap > 0, SPLIT=splits > 1,
        HAS_LSE=return_lse, STEP=STEP, LOWEST=LOWEST,
        num_warps=tile.warps, num_stages=tile.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if splits > 1:
        decode_reduce[(b * heads * sq,)](
            partial, state, out, lse, sq, dv, heads, group, splits, padded,
            DVP=dvp, SPLITS=triton.next_power_of_2(splits), CHUNK=CHUNK, BLOCK_M=tile.block_m, SOFTCAP=softcap > 0,
            HAS_LSE=return_lse, num_warps=4 if dvp >= 128 else 1,
        )  # fmt: skip
    return out, lse
