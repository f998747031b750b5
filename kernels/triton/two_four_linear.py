"""Linear layer with a 2:4 weight, int8 or float: half of the weight is read, and turned dense in registers.

    quads of 4 inputs, G = ceil(K/4); the storage layout of tcompress/packing/sparse_n_m.py
        values [N][G][2]         the two kept ones
        index  bits              two bits each, a nibble a quad: p0 | p1 << 2; rows follow one another without padding

 1. int8 values: quantize_tokens. Floats: x as it lies.
 2. For a block of K: values and nibbles of its quads; element c of a quad is v0 where p0 = c, v1 where p1 = c, else 0.
 3. Products, exact in int32, or float32. Triton has no sparse matrix instruction: what this saves is memory traffic,
    not multiplications.
 4. K split over programs where tiles are few: split_k. linear_finish.

A float token that is not finite gives a row of NaN.

Constraints (`unsupported`): the pattern 2:4. Any number of tokens. Products in the type of the weight where x has it
too, else in float32, without the matrix unit.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from . import autotune
from .linear_finish import ACTIVATIONS, finish, finish_floats
from .numbers import all_finite, capability
from .quantize_tokens import quantize_tokens
from .split_k import sum_of_splits, workspace
from .tiles import PROCESSORS, TileConfig, TileTable


@triton.jit
def _load_quads(VALUES, INDEX, channel, first_quad, quads, BLOCK_N: tl.constexpr, QUADS: tl.constexpr,
                WHOLE_K: tl.constexpr, EVEN: tl.constexpr):  # fmt: skip
    """A dense tile [BLOCK_N, 4 · QUADS] of the channels; 0 beyond the last quad."""
    pair = (first_quad * 2 + tl.arange(0, 2 * QUADS))[None, :]
    value_at = VALUES + channel[:, None] * (2 * quads) + pair
    v = tl.load(value_at) if WHOLE_K else tl.load(value_at, mask=pair < 2 * quads, other=0)
    v0, v1 = tl.split(tl.reshape(v, [BLOCK_N, QUADS, 2]))
    if EVEN:
        # a row begins with a byte
        byte = (first_quad // 2 + tl.arange(0, QUADS // 2))[None, :]
        index_at = INDEX + channel[:, None] * (quads // 2) + byte
        both = tl.load(index_at) if WHOLE_K else tl.load(index_at, mask=byte < quads // 2, other=0)
        nibble = tl.interleave(both & 15, both >> 4)
    else:
        quad = (first_quad + tl.arange(0, QUADS))[None, :]
        number = channel[:, None] * quads + quad
        both = tl.load(INDEX + number // 2, mask=quad < quads, other=0)
        nibble = (both >> ((number % 2) * 4).to(tl.uint8)) & 15
    p0, p1 = (nibble & 3)[:, :, None], (nibble >> 2)[:, :, None]
    c = tl.arange(0, 4).to(tl.uint8)[None, None, :]
    zero = tl.zeros([BLOCK_N, QUADS, 4], v.dtype)
    w = tl.where(p0 == c, v0[:, :, None], tl.where(p1 == c, v1[:, :, None], zero))
    return tl.reshape(w, [BLOCK_N, 4 * QUADS])


@triton.jit(do_not_specialize=["m"])
def two_four(
    A, SCALE, ZERO, VALUES, INDEX, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT, PARTIAL, DONE,
    m, n, k, k_part, quads, stride_a, stride_residual,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE_K: tl.constexpr, EVEN: tl.constexpr, FLOAT32: tl.constexpr, INTEGERS: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    m_tiles, n_tiles = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    tile, split = tl.program_id(0) // SPLIT, tl.program_id(0) % SPLIT
    first = tile // (GROUP * n_tiles) * GROUP
    height = tl.minimum(m_tiles - first, GROUP)
    within = tile % (GROUP * n_tiles)
    rows = (first + within % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (within // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)[None, :]
    # beyond the end the last row is read again: nothing of it is stored
    a_at = A + tl.minimum(rows, m - 1).to(tl.int64)[:, None] * stride_a + ks
    channel = tl.minimum(columns, n - 1).to(tl.int64)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32 if INTEGERS else tl.float32)
    ok = tl.full([BLOCK_M], 1, tl.int1)
    for start in range(split * k_part, tl.minimum(k, (split + 1) * k_part), BLOCK_K):
        w = _load_quads(VALUES, INDEX, channel, start // 4, quads, BLOCK_N, BLOCK_K // 4, WHOLE_K, EVEN)
        if WHOLE_K:
            a = tl.load(a_at + start)
        else:
            a = tl.load(a_at + start, mask=start + ks < k, other=0)
        if INTEGERS:
            acc = tl.dot(a, tl.trans(w), acc, out_dtype=tl.int32)
        else:
            ok = ok & all_finite(a.to(tl.float32), 1)
            if FLOAT32:
                acc = tl.dot(a.to(tl.float32), tl.trans(w.to(tl.float32)), acc, input_precision="ieee")
            else:
                acc = tl.dot(a, tl.trans(w), acc)
    if not INTEGERS:
        acc = tl.where(ok[:, None], acc, float("nan"))
    last = True
    if SPLIT > 1:
        acc, last = sum_of_splits(acc, PARTIAL, DONE, tile, split, SPLIT, BLOCK_M, BLOCK_N)
    if last:
        if INTEGERS:
            scale = tl.load(SCALE + rows, mask=rows < m, other=0.0)
            zero = tl.zeros([BLOCK_M], tl.int32)
            if HAS_ZERO:
                zero = tl.load(ZERO + rows, mask=rows < m, other=0)
            finish(
                acc, rows, columns, m, n, scale, zero, WEIGHT_SCALE, WEIGHT_SUM, BIAS, RESIDUAL, OUT,
                stride_residual, HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip
        else:
            finish_floats(
                acc, rows, columns, m, n, BIAS, RESIDUAL, OUT, stride_residual, HAS_BIAS, HAS_RESIDUAL, ACTIVATION
            )  # fmt: skip


def unsupported(pattern: str, values: torch.dtype) -> str | None:
    """Why this kernel cannot take a weight with such a pattern and values of this type, or None."""
    if pattern != "2:4":
        return f"pattern {pattern}: 2:4"
    if values not in (torch.int8, torch.float32, torch.float16, torch.bfloat16):
        return f"values of {values}: int8 or floats"
    return None


# By rule, not measured; chosen so that nothing spills.
TILES = TileTable(
    "two_four_linear",
    {
        "narrow 16": TileConfig(16, 32, 128, 4, 4),
        "narrow 32": TileConfig(32, 32, 128, 4, 4),
        "narrow 16, float32": TileConfig(16, 16, 32, 4, 4),
        "narrow 32, float32": TileConfig(32, 16, 32, 4, 4),
        "wide": TileConfig(128, 64, 64, 8, 3),
        "wide, int8": TileConfig(128, 64, 128, 8, 3),
        # with 64 products a step 8 instructions of 661 spilled, with 32 none, for 632 instructions for as many products
        "wide, 16 bits": TileConfig(128, 64, 32, 8, 3),
        "wide, float32": TileConfig(32, 64, 32, 4, 2),
        "middle": TileConfig(64, 64, 64, 4, 3),
        "middle, int8": TileConfig(64, 64, 128, 4, 3),
    },
    sm_90={"wide, 16 bits": TileConfig(128, 64, 64, 8, 3)},
)


def two_four_tile(capability: int, m: int, n: int, k: int, dtype: torch.dtype) -> TileConfig:
    """`dtype`: of the products."""
    floats = ", float32" if dtype == torch.float32 else ""
    if m <= 32:
        tile, split = TILES.tile(capability, f"narrow {16 if m <= 16 else 32}{floats}"), 1
        while -(-n // tile.block_n) * split < PROCESSORS and k >= 1024 * split and split < 16:
            split *= 2
        return replace(tile, split=split)
    if floats:
        return TILES.tile(capability, "wide, float32")
    wide = -(-m // 128) * -(-n // 64) >= PROCESSORS and m > 128
    if wide and dtype in (torch.float16, torch.bfloat16):
        return TILES.tile(capability, "wide, 16 bits")
    # the masks of a tail take registers: shorter steps
    long = ", int8" if dtype == torch.int8 and k % 128 == 0 else ""
    return TILES.tile(capability, ("wide" if wide else "middle") + long)


def _candidates(stored: TileConfig) -> list[TileConfig]:
    tiles = autotune.neighbours(stored, block_n=(16, 32, 64, 128), warps=(4, 8), stages=(2, 3, 4))
    return tiles + (autotune.neighbours(stored, split=(1, 2, 4, 8, 16)) if stored.block_m <= 32 else [])


def two_four_linear(
    x: torch.Tensor,
    values: torch.Tensor,
    index: torch.Tensor,
    out_features: int,
    weight_scale: torch.Tensor | None = None,
    weight_sum: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """`activation(x Wᵀ + bias) + residual` with a 2:4 W in the storage layout; checked arguments.

    The numbers are those of `int8_linear` (int8 values) or of `sparse_linear` (floats) for the dense weight.

    Args:
        x: [..., K], any float type, any strides.
        values: [N · G · 2], int8 or float; index: [ceil(N · G / 2)] uint8: `packing.SparseWeight` of the pattern 2:4.
        weight_scale: [N] float32, of int8 values. weight_sum: [N] int32, sums of the weights; asymmetric activations.
        act_bits, act_symmetric: of int8 values.
        tile: other than `autotune` chooses, which starts from `two_four_tile`.

    Returns:
        [..., N]; with int8 values `out_dtype=torch.int32` gives the exact sums.
    """
    k, n, whole = x.shape[-1], out_features, values.dtype == torch.int8
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if k == 0:  # one quad of zeros a channel
        x, k = x.new_zeros((*x.shape[:-1], 1)), 1
        values, index = values.new_zeros(2 * n), index.new_full(((n + 1) // 2,), 0x44)
    rows = x.reshape(-1, k)
    m, quads = rows.shape[0], triton.cdiv(k, 4)
    dtype = values.dtype if whole or values.dtype == x.dtype else torch.float32
    if tile is None:
        sizes = f"{autotune.tokens(m)}x{k}x{n} {x.dtype} {values.dtype} {act_bits} {act_symmetric} {activation}"
        arguments = (x, values, index, n, weight_scale, weight_sum, bias, act_bits, act_symmetric, activation)
        stored = two_four_tile(capability(x), m, n, k, dtype)
        tile = autotune.choose(
            "two_four_linear", sizes, stored, lambda: _candidates(stored),
            lambda tile: two_four_linear(*arguments, out_dtype, residual, tile), x,
        )  # fmt: skip
    a = scale = zero = rows if rows.stride(1) == 1 else rows.contiguous()
    if whole:
        a, scale, zero = quantize_tokens(rows, act_bits, act_symmetric)
    if residual is not None:
        residual = residual.reshape(m, n)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    tiles = triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n)
    part = triton.cdiv(triton.cdiv(k, tile.split), tile.block_k) * tile.block_k
    split = triton.cdiv(k, part)
    partial = done = out
    if split > 1:
        cells = tile.block_m * tile.block_n
        partial, done = workspace(tiles, split, cells, torch.int32 if whole else torch.float32, x.device)
    two_four[(tiles * split,)](
        a, scale, zero, values, index, scale if weight_scale is None else weight_scale,
        scale if weight_sum is None else weight_sum, scale if bias is None else bias.contiguous(),
        scale if residual is None else residual, out, partial, done,
        m, n, k, part, quads, a.stride(0), 0 if residual is None else residual.stride(0),
        BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k, GROUP=tile.group, SPLIT=split,
        WHOLE_K=k % tile.block_k == 0, EVEN=quads % 2 == 0, FLOAT32=dtype == torch.float32, INTEGERS=whole,
        HAS_ZERO=whole and not act_symmetric, HAS_BIAS=bias is not None, HAS_RESIDUAL=residual is not None,
        ACTIVATION=ACTIVATIONS.index(activation), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
