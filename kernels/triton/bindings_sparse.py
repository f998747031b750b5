"""`bindings` of the ops of sparse weights: which layouts the kernels read, and how an op's arguments reach them.

The layouts are those of `sparse_layout` and `int4_sparse_layout`, packed and read back in plain torch.
"""

from __future__ import annotations

import torch

from . import int4_sparse_layout, sparse_layout
from .kernel_binding import Kernel, Maybe
from .sparse_layout import FLOAT_LAYOUTS, INT8_LAYOUTS, TWO_FOUR


def _unsupported_layout(layout: str, floats: bool) -> str | None:
    return None if layout in (FLOAT_LAYOUTS if floats else INT8_LAYOUTS) else sparse_layout.NOT_OURS.format(layout)


def sparse_prepack(weight: torch.Tensor, layout: str) -> torch.Tensor:
    return sparse_layout.pack(weight, FLOAT_LAYOUTS[layout][0])


def sparse_prepack_unsupported(weight: torch.Tensor, layout: str) -> str | None:
    return _unsupported_layout(layout, weight.is_floating_point())


def sparse_unpack(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    return sparse_layout.unpack(kernel_weight, n, k, dtype, FLOAT_LAYOUTS[layout][0])


def sparse_unpack_unsupported(
    kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str
) -> str | None:
    return _unsupported_layout(layout, dtype.is_floating_point)


def sparse_linear(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: Maybe,
    layout: str,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: Maybe = None,
) -> torch.Tensor:
    pattern, dtype = FLOAT_LAYOUTS[layout]
    weight = sparse_layout.parts(kernel_weight, out_features, x.shape[-1], dtype, pattern)
    options = (bias, 8, True, activation, out_dtype, residual)
    return _multiply(x, weight, out_features, pattern, None, options)


def sparse_linear_unsupported(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: Maybe = None,
    layout: str = "unstructured",
    *args: object,
    **kwargs: object,
) -> str | None:
    return _unsupported_layout(layout, True)


def int8_sparse_linear(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: Maybe,
    layout: str,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: Maybe = None,
) -> torch.Tensor:
    n, pattern = weight_scale.shape[0], INT8_LAYOUTS[layout][0]
    weight = sparse_layout.parts(kernel_weight, n, x.shape[-1], torch.int8, pattern)
    options = (bias, act_bits, act_symmetric, activation, out_dtype, residual)
    return _multiply(x, weight, n, pattern, weight_scale.contiguous(), options)


def int8_sparse_linear_unsupported(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: Maybe = None,
    layout: str = "1x4",
    *args: object,
    **kwargs: object,
) -> str | None:
    return _unsupported_layout(layout, False)


def _multiply(
    x: torch.Tensor,
    weight: sparse_layout.Parts,
    n: int,
    pattern: str,
    weight_scale: Maybe,
    options: tuple[Maybe, int, bool, str, torch.dtype | None, Maybe],
) -> torch.Tensor:
    if pattern == TWO_FOUR:
        from .two_four_linear import two_four_linear

        assert weight.places is not None
        return two_four_linear(x, weight.values, weight.places, n, weight_scale, weight.total, *options)
    from .block_panels import BlockRows
    from .block_sparse_linear import block_sparse_linear

    assert weight.start is not None
    assert weight.column is not None
    kept, size = BlockRows(weight.start, weight.column), sparse_layout.block_size(pattern)
    return block_sparse_linear(x, weight.values, kept, n, size, weight_scale, weight.total, *options)


# ---- 4 bits ---------------------------------------------------------------------------------------------------------


def _unsupported_int4(layout: str) -> str | None:
    return None if layout in int4_sparse_layout.LAYOUTS else sparse_layout.NOT_OURS.format(layout)


def int4_sparse_prepack(weight: torch.Tensor, weight_scale: torch.Tensor, group_size: int, layout: str) -> torch.Tensor:
    return int4_sparse_layout.pack(weight, weight_scale, group_size, int4_sparse_layout.LAYOUTS[layout])


def int4_sparse_prepack_unsupported(
    weight: torch.Tensor, weight_scale: torch.Tensor, group_size: int, layout: str = "8x4"
) -> str | None:
    return _unsupported_int4(layout)


def int4_sparse_unpack(
    kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    pattern = int4_sparse_layout.LAYOUTS[layout]
    return int4_sparse_layout.unpack(kernel_weight, n, k, group_size, scale_dtype, pattern)


def int4_sparse_unpack_unsupported(
    kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, layout: str = "8x4"
) -> str | None:
    return _unsupported_int4(layout)


def int4_sparse_linear(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: Maybe,
    group_size: int,
    scale_dtype: torch.dtype,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: Maybe,
    layout: str,
) -> torch.Tensor:
    from .block_panels import BlockRows
    from .int4_sparse_linear import int4_sparse_linear

    pattern = int4_sparse_layout.LAYOUTS[layout]
    weight = int4_sparse_layout.parts(kernel_weight, out_features, x.shape[-1], group_size, scale_dtype, pattern)
    operands = (x, weight.values, BlockRows(weight.start, weight.column), weight.scale)
    size = sparse_layout.block_size(pattern)
    return int4_sparse_linear(
        *operands, size, bias, act_bits, act_symmetric, activation, out_dtype, residual, group_size=group_size
    )


def int4_sparse_linear_unsupported(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    out_features: int,
    bias: Maybe = None,
    group_size: int = 128,
    scale_dtype: torch.dtype = torch.float16,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_dtype: torch.dtype | None = None,
    residual: Maybe = None,
    layout: str = "8x4",
) -> str | None:
    return _unsupported_int4(layout)


KERNELS = {
    "sparse_prepack": Kernel(sparse_prepack, sparse_prepack_unsupported),
    "sparse_unpack": Kernel(sparse_unpack, sparse_unpack_unsupported),
    "sparse_linear": Kernel(sparse_linear, sparse_linear_unsupported),
    "int8_sparse_linear": Kernel(int8_sparse_linear, int8_sparse_linear_unsupported),
    "int4_sparse_prepack": Kernel(int4_sparse_prepack, int4_sparse_prepack_unsupported),
    "int4_sparse_unpack": Kernel(int4_sparse_unpack, int4_sparse_unpack_unsupported),
    "int4_sparse_linear": Kernel(int4_sparse_linear, int4_sparse_linear_unsupported),
}
