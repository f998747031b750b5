"""int4 linear: which kernel runs, and the launch; the op `int4_linear` for a weight in the storage layout.

    tokens      W4A16 launches         W4A8 launches
    1           1   int4_narrow        1   int4_narrow quantizes x itself
    <= 32       1   int4_narrow        2   quantize_tokens, int4_narrow
    < 256       1   int4_wide          2   quantize_tokens, int4_wide
    more        2+  int4_dequantize    2   quantize_tokens, int4_wide
                    and torch's product, where x and the result have one 16-bit type; else int4_wide

With K split over programs one more, which clears the counts.

Constraints (`bindings_int4`): the storage layout is there (`weight`); a group size that is a power of two from 32 on,
or one scale a channel. Any number of tokens.
"""

from __future__ import annotations

import torch
import triton

from . import autotune
from .int4_dequantize import dequantized_product
from .int4_narrow import int4_narrow
from .int4_tiles import NARROW_TOKENS, int4_tile
from .int4_wide import int4_wide
from .linear_finish import ACTIVATIONS
from .numbers import capability, steps
from .quantize_tokens import quantize_tokens
from .reasons import LEAST_GROUP, multiplies_dequantized
from .split_k import workspace
from .tiles import TileConfig


def _candidates(stored: TileConfig) -> list[TileConfig]:
    tiles = autotune.neighbours(stored, block_n=(16, 32, 64, 128), warps=(4, 8), stages=(2, 3, 4, 5))
    return tiles + (autotune.neighbours(stored, split=(1, 2, 4, 8, 16)) if stored.block_m <= NARROW_TOKENS else [])


def int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    group_size: int = 128,
    act_bits: int | None = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: torch.Tensor | None = None,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """`tcompress.ops.int4_linear` for a weight in the storage layout; checked arguments.

    Args:
        x: [..., K], any float type; weight [N, ceil(K/2)] uint8; weight_scale, zero_point [N, ceil(K/g)]; bias [N];
            residual [..., N]: as the op has them.
        act_bits: None leaves x in floats. float32 is multiplied in float32, without the matrix unit.
        tile: other than `autotune` chooses, which starts from `int4_tile`; `block_m` up to 32 and at least M means
            int4_narrow, and none means int4_dequantize.

    Returns:
        [..., N] in `out_dtype`, by default the type of x.
    """
    k, n = x.shape[-1], weight_scale.shape[0]
    out = torch.empty((*x.shape[:-1], n), dtype=out_dtype or x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if k == 0:  # one product, with a weight of scale 0
        x = x.new_zeros((*x.shape[:-1], 1))
        weight, weight_scale, zero_point = weight.new_zeros(n, 1), weight_scale.new_zeros(n, 1), None
        k = 1
    rows = x.reshape(-1, k)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    m, whole = rows.shape[0], act_bits is not None
    groups = weight_scale.shape[1]
    group_size = group_size if groups > 1 else max(LEAST_GROUP, triton.next_power_of_2(k))
    if residual is not None:
        residual = residual.reshape(m, n)
        residual = residual if residual.stride(1) == 1 else residual.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    weight_scale, zero_point = weight_scale.contiguous(), None if zero_point is None else zero_point.contiguous()
    if tile is None and multiplies_dequantized(m, act_bits, x.dtype, out_dtype):
        operands = (rows, weight, weight_scale, zero_point, bias, group_size, activation, residual)
        dequantized_product(*operands, out.view(m, n))
        return out
    if tile is None:
        sizes = f"{autotune.tokens(m)}x{k}x{n} {x.dtype} g{group_size} {act_bits} {act_symmetric} {activation}"
        arguments = (x, weight, weight_scale, zero_point, bias, group_size, act_bits, act_symmetric, activation)
        stored = int4_tile(capability(x), m, n, k, group_size, torch.int8 if whole else x.dtype)
        tile = autotune.choose(
            "int4_linear", sizes, stored, lambda: _candidates(stored),
            lambda tile: int4_linear(*arguments, out_dtype, residual, tile), x,
        )  # fmt: skip
    narrow = m <= tile.block_m <= NARROW_TOKENS
    quantize = whole and narrow and tile.block_m == 1
    a, scale, zero = rows, weight_scale, weight_scale  # the last two are not read
    if whole and not quantize:
        a, scale, zero = quantize_tokens(rows, act_bits or 8, act_symmetric)
    pointers = (
        a, scale, zero, weight, weight_scale, weight if zero_point is None else zero_point,
        weight_scale if bias is None else bias.contiguous(), weight_scale if residual is None else residual, out,
    )  # fmt: skip
    strides = (a.stride(0), weight.stride(0), 0 if residual is None else residual.stride(0))
    flags = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "WHOLE_K": k % tile.block_k == 0,
        "GROUP_SIZE": group_size, "INTEGERS": whole, "HAS_ZERO": whole and not act_symmetric,
        "HAS_WEIGHT_ZERO": zero_point is not None, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": ACTIVATIONS.index(activation), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    tiles = triton.cdiv(n, tile.block_n)
    if not narrow:
        int4_wide[(triton.cdiv(m, tile.block_m) * tiles,)](
            *pointers, m, n, k, groups, *strides, GROUP=tile.group, **flags
        )
        return out
    unit = max(tile.block_k, group_size if groups > 1 else 0)
    part = triton.cdiv(triton.cdiv(k, tile.split), unit) * unit
    split = triton.cdiv(k, part)
    partial = done = out
    if split > 1:
        partial, done = workspace(tiles, split, tile.block_m * tile.block_n, torch.float32, x.device)
    q_max, step, lowest = steps(act_bits or 8, act_symmetric)
    int4_narrow[(tiles * split,)](
        *pointers, partial, done, m, n, k, part, groups, *strides, SPLIT=split, QUANTIZE=quantize,
        Q_MAX=q_max, STEP=step, LOWEST=lowest, **flags, enable_fp_fusion=not quantize,
    )  # fmt: skip
    return out
