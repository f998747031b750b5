"""An int4 weight out of its kernel layout."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops import int4_cuda_layout
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int4_prepack import (
    GROUP_SIZES,
    PAD_K,
    PAIR,
    QUAD,
    SCALE_DTYPES,
    check_kernel_weight,
    why_not_the_cpu_layout,
)
from tcompress.ops.int8_prepack import GROUP_PANELS, PANEL
from tcompress.packing.int4 import join_nibbles

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def int4_unpack(
    kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, has_zero_points: bool
) -> Parts:
    """The inverse of `int4_prepack`.

    Args:
        kernel_weight: the result of `int4_prepack` of a weight with N outputs and K inputs.
        n, k, group_size, scale_dtype: as it was packed.
        has_zero_points: whether it was packed with zero points.

    Returns:
        weight [N, ceil(K/2)] uint8, weight_scale [N, ceil(K/g)], and zero_point [N, ceil(K/g)] uint8, which is [0, 0]
        where there are none.

    Raises:
        TypeError: a wrong dtype. ValueError: a size that these arguments do not give.
    """
    op = "int4_unpack"
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(message(op, "scale_dtype", scale_dtype, "float16 or float32"))
    if group_size not in GROUP_SIZES and group_size < max(k, 1):
        raise ValueError(message(op, "group_size", group_size, f"one of {GROUP_SIZES}, or at least K = {k}"))
    check_kernel_weight(op, kernel_weight, n, k, group_size, scale_dtype.itemsize, has_zero_points)
    return backend.call(op, kernel_weight, n, k, group_size, scale_dtype, has_zero_points)


def _rows(memory: torch.Tensor, n: int, count: int, inner: int) -> torch.Tensor:
    """What `int4_prepack` laid out, bytes, back to [N, count, inner]."""
    n_padded, width = n + -n % PANEL, GROUP_PANELS * PANEL
    groups = [memory.new_empty(0, count, inner)]
    for start in range(0, n_padded, width):
        columns = min(width, n_padded - start)
        group = memory[start * count * inner : (start + columns) * count * inner]
        groups.append(group.view(count, columns, inner).transpose(0, 1))
    return torch.cat(groups)[:n]


def reference(
    kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, has_zero_points: bool
) -> Parts:
    if kernel_weight.dtype == int4_cuda_layout.DTYPE:
        return int4_cuda_layout.unpack(kernel_weight, n, k, group_size, scale_dtype, has_zero_points)
    n_padded, groups = n + -n % PANEL, -(-k // group_size)
    memory = kernel_weight.view(torch.uint8)
    scales = n_padded * (k + -k % PAD_K) // 2
    zeros = scales + n_padded * groups * scale_dtype.itemsize
    pairs = _rows(memory[:scales], n, (k + -k % PAD_K) // PAIR, QUAD)
    q = torch.stack([pairs & 15, pairs >> 4], 2).flatten(1)[:, :k]
    scale = _rows(memory[scales:zeros], n, groups, scale_dtype.itemsize).view(scale_dtype).view(n, groups)
    zero_point = kernel_weight.new_empty((0, 0), dtype=torch.uint8)
    if has_zero_points:
        zero_point = _rows(memory[zeros:], n, groups, 1).view(n, groups)
    return join_nibbles(q), scale, zero_point


def fake(
    kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, has_zero_points: bool
) -> Parts:
    groups = -(-k // group_size)
    return (
        kernel_weight.new_empty((n, (k + 1) // 2), dtype=torch.uint8),
        kernel_weight.new_empty((n, groups), dtype=scale_dtype),
        kernel_weight.new_empty((n, groups) if has_zero_points else (0, 0), dtype=torch.uint8),
    )


def flops(kernel_weight: torch.Tensor, *args: object) -> int:
    return 0


def nbytes(kernel_weight: torch.Tensor, *args: object) -> int:
    return 2 * kernel_weight.nbytes


define(
    Op(
        name="int4_unpack",
        schema=(
            "(Tensor kernel_weight, int n, int k, int group_size, ScalarType scale_dtype, bool has_zero_points)"
            " -> (Tensor, Tensor, Tensor)"
        ),
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)


def _cpu_unsupported(kernel_weight: torch.Tensor, *args: object, **more: object) -> str | None:
    return cpu_unsupported(kernel_weight) or why_not_the_cpu_layout(kernel_weight)


backend.register_kernel("int4_unpack", "cpu", unsupported=_cpu_unsupported)
