"""Round to nearest: the quantization that needs no data."""

from __future__ import annotations

import torch

from tcompress.packing import PackedWeight
from tcompress.quantize.range_search import Range, find_grid
from tcompress.quantize.scheme import QuantArgs


def round_to_nearest(
    weight: torch.Tensor, args: QuantArgs, *, range: Range = "minmax", importance: torch.Tensor | None = None
) -> PackedWeight:
    """Quantizes a weight by the range of what shares a scale: an output channel, or a group of it along K.

    ::

        symmetric:   scale = max|W| / (2^(bits-1) - 1),                q = round(W / scale)
        asymmetric:  scale = (max(W,0) - min(W,0)) / (2^bits - 1),     q = round(W / scale) + zero_point
                     zero_point = round(-min(W,0) / scale)

    Rounding is half to even; scales are rounded to the type they are stored in before the integers are found. Up to 4
    bits are stored in layout "int4", symmetric ones with 8 added; more in layout "dense".

    Args:
        weight: [N, K], any float type; computed in float32.
        args: of a `Scheme`'s weights.
        range: all of it, or a part that is found (`find_grid`).
        importance: [K], for range "mse": what an error in each input's weight costs, E[x²] for one.

    Raises:
        ValueError: the weight is not two-dimensional, holds NaN or infinity, or is too large for float16 scales.
    """
    grid = find_grid(weight, args, "round_to_nearest", range, importance)
    return grid.pack(grid.integers(weight))
