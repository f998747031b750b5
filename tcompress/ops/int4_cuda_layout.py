"""The kernel layout of an int4 weight on CUDA, drawn in `csrc/cuda/int4_linear.h`: what the CUDA C++ kernel reads.

Units of 32 outputs x 32 inputs, `[N/32][K/32][lane 32][4]` words of eight weights in the order in which a lane of a
warp multiplies them; then the scales, `[ceil(K/g)][N]` float32, and the zero points, as many uint8; N padded to 32.

Paper: Frantar et al. (MARLIN), arXiv 2408.11743, section 3.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress.packing.int4 import join_nibbles, unpack_int4

#: Of the layout; that of the CPU kernels is int8.
DTYPE = torch.int32
UNIT = 32
TILE = 8  # columns of a product
SYMMETRIC_ZERO = 8


def kernel_words(n: int, k: int, group_size: int) -> int:
    """Words of the layout."""
    columns, steps = n + -n % UNIT, -(-k // UNIT)
    return columns * (steps * UNIT // 2 + -(-k // group_size) * 5) // 4


def pack(
    weight: torch.Tensor, weight_scale: torch.Tensor, zero_point: torch.Tensor | None, k: int, group_size: int
) -> torch.Tensor:
    """From the storage layout; arguments as `int4_prepack` has them. Returns int32, one-dimensional."""
    n = weight.shape[0]
    q = F.pad(unpack_int4(weight, k), (0, -k % UNIT, 0, -n % UNIT))
    # n: block, tile, lane / 4; k: step, nibble % 4, lane % 4, nibble / 4
    parts = q.view(q.shape[0] // UNIT, UNIT // TILE, TILE, q.shape[1] // UNIT, 4, 4, 2)
    nibbles = parts.permute(0, 3, 2, 5, 1, 6, 4).reshape(-1, 2)
    zeros = torch.full_like(weight_scale, SYMMETRIC_ZERO, dtype=torch.uint8) if zero_point is None else zero_point
    scale = F.pad(weight_scale.float(), (0, 0, 0, -n % UNIT)).t().contiguous()
    zeros = F.pad(zeros, (0, 0, 0, -n % UNIT), value=SYMMETRIC_ZERO).t().contiguous()
    bytes_of = (nibbles[:, 0] | (nibbles[:, 1] << 4), scale.view(-1).view(torch.uint8), zeros.view(-1))
    return torch.cat(bytes_of).view(DTYPE)


def unpack(
    kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, has_zero_points: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The inverse; arguments and result as `int4_unpack` has them."""
    columns, steps, groups = n + -n % UNIT, -(-k // UNIT), -(-k // group_size)
    memory = kernel_weight.view(torch.uint8)
    packed, scale, zeros = memory.split(
        [columns * steps * UNIT // 2, columns * groups * 4, columns * groups],
    )
    nibbles = torch.stack([packed & 15, packed >> 4], -1)
    parts = nibbles.view(columns // UNIT, steps, TILE, 4, UNIT // TILE, 2, 4)
    q = parts.permute(0, 4, 2, 1, 6, 3, 5).reshape(columns, steps * UNIT)[:n, :k]
    scales = scale.view(torch.float32).view(groups, columns)[:, :n].t().to(scale_dtype).contiguous()
    zero_point = kernel_weight.new_empty((0, 0), dtype=torch.uint8)
    if has_zero_points:
        zero_point = zeros.view(groups, columns)[:, :n].t().contiguous()
    return join_nibbles(q), scales, zero_point
