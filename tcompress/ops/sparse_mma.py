"""The layout "mma-2:4" of `sparse_prepack`: fragments of `mma.sp`, which `csrc/cuda/two_four_linear.h` draws.

    [ceil(N/16)][ceil(K/64)] units, 16 outputs x 64 inputs of which 32 are kept:
        lane [32][16 bytes]   word r of lane 4g + t: kept 4t + 16 (r/2) … + 3 of output g + 8 (r%2)
        lane [32] words       places: eight nibbles p0 | p1 << 2 of quads 8 (t/2) … + 7 of output g + 8 (t%2)

A quad beyond N or K keeps two zeros, at places 0 and 1.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress.kernels.triton import sparse_layout

MMA_TWO_FOUR = "mma-2:4"
OUTPUTS, INPUTS = 16, 64
QUADS = INPUTS // sparse_layout.QUAD
VALUE_BYTES, UNIT_BYTES = 512, 640


def mma_bytes(n: int, k: int) -> int:
    """Of a weight [N, K]."""
    return -(-n // OUTPUTS) * -(-k // INPUTS) * UNIT_BYTES


def pack_mma(weight: torch.Tensor) -> torch.Tensor:
    """[N, K] int8, of which at most two in each four along K are not zero, to the layout."""
    n, k = weight.shape
    rows, steps = -(-n // OUTPUTS), -(-k // INPUTS)
    padded = F.pad(weight, (0, -k % INPUTS, 0, -n % OUTPUTS))
    values, nibbles = sparse_layout.quads(padded)
    # output 8h + g, kept 16i + 4t + b: lane (g, t), word 2i + h
    kept = values.reshape(rows, 2, 8, steps, 2, 4, 4).permute(0, 3, 2, 5, 4, 1, 6).reshape(rows, steps, VALUE_BYTES)
    # output 8h + g, quad 8u + i: lane (g, 2u + h)
    places = nibbles.reshape(rows, 2, 8, steps, 2, 4, 2).permute(0, 3, 2, 4, 1, 5, 6)
    words = (places[..., 0] | places[..., 1] << 4).reshape(rows, steps, UNIT_BYTES - VALUE_BYTES)
    return torch.cat([kept, words.view(torch.int8)], 2).flatten()


def unpack_mma(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """The inverse of `pack_mma`."""
    rows, steps = -(-n // OUTPUTS), -(-k // INPUTS)
    units = packed.view(rows, steps, UNIT_BYTES)
    kept = units[..., :VALUE_BYTES].reshape(rows, steps, 8, 4, 2, 2, 4).permute(0, 5, 2, 1, 4, 3, 6)
    words = units[..., VALUE_BYTES:].contiguous().view(torch.uint8)
    places = torch.stack([words & 15, words >> 4], 3).reshape(rows, steps, 8, 2, 2, 4, 2).permute(0, 4, 2, 1, 3, 5, 6)
    shape = (rows * OUTPUTS, steps * QUADS)
    dense = sparse_layout.dense_of_quads(kept.reshape(*shape, 2), places.reshape(shape))
    return dense[:n, :k].contiguous()
