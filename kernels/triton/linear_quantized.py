"""int8 linear over activations that are integers already: the launch of linear_narrow or linear_wide without a
quantizer.

Zero points are taken from the integers before (`centred`): 7 bits less a zero point of 7 bits fit int8, the sums are
the same, and nobody has to know the sums of the weight, which would be read once more at each call for them.
"""

from __future__ import annotations

import torch
import triton

from .linear_finish import ACTIVATIONS
from .linear_narrow import linear_narrow
from .linear_tiles import NARROW_TOKENS, int8_linear_tile
from .linear_wide import linear_wide
from .numbers import capability
from .quantize_tokens import aligned_rows
from .tiles import TileConfig


def centred(q: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    """q - zero_point as int8, for integers and zero points of 0 … 127; the result in new memory."""
    return q.view(torch.int8) - zero_point.to(torch.int8)


def multiply(
    q: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    tile: TileConfig | None = None,
) -> torch.Tensor:
    """`activation(q weightᵀ · scale · weight_scale + bias) + residual`; checked arguments.

    Args:
        q: [M, Kp] int8, last stride 1, -127 … 127; columns from K on are not read.
        scale: [M] float32, contiguous.
        weight: [N, K] int8. weight_scale: [N] float32. bias: [N] or None.
        dtype: of the result; int32 gives the sums.
        residual: [M, N] or None.
        tile: other than `linear_tiles` has.

    Returns:
        [M, N].
    """
    (n, k), m = weight.shape, q.shape[0]
    out = torch.empty((m, n), dtype=dtype, device=q.device)
    if m == 0 or n == 0:
        return out
    if k == 0:
        q, weight, k = q.new_zeros((m, 1)), weight.new_zeros((n, 1)), 1
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    residual = residual if residual is None or residual.stride(1) == 1 else residual.contiguous()
    if tile is None:
        tile = int8_linear_tile(capability(q), m, n, k)
    narrow = m <= tile.block_m <= NARROW_TOKENS
    if not narrow:
        q, weight = aligned_rows(q), aligned_rows(weight)
        k = min(q.shape[1], weight.shape[1])  # what q has beyond K meets zeros
    nowhere = weight_scale
    pointers = (
        q, scale, nowhere, weight, weight_scale, nowhere, nowhere if bias is None else bias.contiguous(),
        nowhere if residual is None else residual, out,
    )  # fmt: skip
    stride_residual = 0 if residual is None else residual.stride(0)
    constants = {
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k, "WHOLE_K": k % tile.block_k == 0,
        "HAS_ZERO": False, "HAS_BIAS": bias is not None, "HAS_RESIDUAL": residual is not None,
        "ACTIVATION": ACTIVATIONS.index(activation), "num_warps": tile.warps, "num_stages": tile.stages,
    }  # fmt: skip
    if not narrow:
        grid = (triton.cdiv(m, tile.block_m) * triton.cdiv(n, tile.block_n),)
        linear_wide[grid](
            *pointers, m, n, k, q.stride(0), weight.stride(0), stride_residual, GROUP=tile.group, **constants,
            **({} if tile.registers is None else {"maxnreg": tile.registers}),
        )  # fmt: skip
        return out
    tiles = triton.cdiv(n, tile.block_n)
    part = triton.cdiv(triton.cdiv(k, tile.split), tile.block_k) * tile.block_k
    partial = done = out
    if tile.split > 1:
        cells = tiles * tile.block_m * tile.block_n
        partial = torch.zeros(cells + tiles, dtype=torch.int32, device=q.device)
        done = partial[cells:]
    linear_narrow[(tiles * tile.split,)](
        *pointers, partial, done, m, n, k, part, q.stride(0), 1, weight.stride(0), stride_residual,
        SPLIT=tile.split, QUANTIZE=False, Q_MAX=127, STEP=0.0, LOWEST=0.0, **constants,
    )  # fmt: skip
    return out
