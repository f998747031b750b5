"""A 4-bit weight with zeros out of its kernel layout."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.kernels.triton import int4_sparse_layout
from tcompress.ops._registry import Op, define
from tcompress.ops.int4_prepack import GROUP_SIZES, MAX_K, SCALE_DTYPES
from tcompress.ops.int4_sparse_prepack import (
    BLOCK_BYTES,
    BLOCK_ROWS,
    CPU_LAYOUT,
    ZERO,
    check_layout,
    parts,
    why_not_on_cpu,
)
from tcompress.ops.sparse_prepack import PAD, QUAD, unpack_bitmap


def int4_sparse_unpack(
    kernel_weight: torch.Tensor,
    n: int,
    k: int,
    group_size: int,
    scale_dtype: torch.dtype,
    layout: str = CPU_LAYOUT,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `int4_sparse_prepack`.

    Args:
        kernel_weight: the result of `int4_sparse_prepack` of a weight with N outputs and K inputs.
        n, k: the shape of the weight.
        group_size: as it was packed.
        scale_dtype: type of the scales.
        layout: as it was packed.

    Returns:
        The weight [N, K] int8, and its scales [N, ceil(K/g)].

    Raises:
        TypeError: a wrong dtype. ValueError: a size that no such weight gives, a group size that no kernel has.
    """
    check_kernel_weight("int4_sparse_unpack", kernel_weight, n, k, group_size, scale_dtype, layout)
    return backend.call("int4_sparse_unpack", kernel_weight, n, k, group_size, scale_dtype, layout)


def check_kernel_weight(
    op: str, kernel_weight: torch.Tensor, n: int, k: int, group_size: int, scale_dtype: torch.dtype, layout: str
) -> None:
    """Raises unless `kernel_weight` can be the kernel layout of a weight [N, K]."""
    check_layout(op, layout)
    if kernel_weight.dtype != torch.int8:
        raise TypeError(message(op, "kernel_weight", kernel_weight.dtype, "int8, from int4_sparse_prepack"))
    if scale_dtype not in SCALE_DTYPES:
        raise TypeError(message(op, "scale_dtype", scale_dtype, "float16 or float32"))
    if k > MAX_K:
        raise ValueError(message(op, "K", k, f"at most {MAX_K}", "a longer sum could leave int32"))
    if group_size not in GROUP_SIZES and group_size < max(k, 1):
        raise ValueError(message(op, "group_size", group_size, f"one of {GROUP_SIZES}, or at least K = {k}"))
    sizes = (max(n, 0), max(k, 0), group_size)
    if layout == CPU_LAYOUT:
        least, block = parts(*sizes, scale_dtype.itemsize, 0)["bytes"], BLOCK_BYTES
    else:
        pattern = int4_sparse_layout.LAYOUTS[layout]
        least = int4_sparse_layout.least_bytes(*sizes, scale_dtype, pattern)
        block = int4_sparse_layout.block_bytes(pattern)
    size = kernel_weight.numel()
    if min(n, k) < 0 or kernel_weight.dim() != 1 or size < least or (size - least) % block:
        expected = f"[{least} + {block} a block] for N={n}, K={k}"
        raise ValueError(message(op, "kernel_weight", list(kernel_weight.shape), expected, "from int4_sparse_prepack"))


def reference(
    kernel_weight: torch.Tensor,
    n: int,
    k: int,
    group_size: int,
    scale_dtype: torch.dtype,
    layout: str = CPU_LAYOUT,
) -> tuple[torch.Tensor, torch.Tensor]:
    if layout != CPU_LAYOUT:
        pattern = int4_sparse_layout.LAYOUTS[layout]
        return int4_sparse_layout.unpack(kernel_weight, n, k, group_size, scale_dtype, pattern)
    rows, units, groups = -(-n // BLOCK_ROWS), -(-k // QUAD), -(-k // group_size)
    where = parts(n, k, group_size, scale_dtype.itemsize, 0)
    kept = unpack_bitmap(kernel_weight[: where["offsets"]], rows, units)
    values = kernel_weight[where["values"] : kernel_weight.numel() - PAD].view(torch.uint8).view(-1, BLOCK_BYTES)
    nibbles = torch.cat([values & 15, values >> 4], 1).to(torch.int8) - ZERO
    blocks = kernel_weight.new_zeros((rows, units, BLOCK_ROWS, QUAD))
    blocks[kept] = nibbles.view(-1, BLOCK_ROWS, QUAD)
    weight = blocks.transpose(1, 2).reshape(rows * BLOCK_ROWS, units * QUAD)[:n, :k].contiguous()
    size = rows * groups * BLOCK_ROWS * scale_dtype.itemsize
    # A copy: in the kernel layout, scales may lie where no view of their type begins.
    scale = kernel_weight[where["scales"] : where["scales"] + size].clone().view(scale_dtype)
    scale = scale.view(rows, groups, BLOCK_ROWS).transpose(1, 2).reshape(rows * BLOCK_ROWS, groups)
    return weight, scale[:n].contiguous()


def fake(
    kernel_weight: torch.Tensor,
    n: int,
    k: int,
    group_size: int,
    scale_dtype: torch.dtype,
    layout: str = CPU_LAYOUT,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = -(-k // group_size)
    return kernel_weight.new_empty((n, k)), kernel_weight.new_empty((n, groups), dtype=scale_dtype)


def flops(kernel_weight: torch.Tensor, *args: object) -> int:
    return 0


def nbytes(kernel_weight: torch.Tensor, n: int, k: int, *args: object) -> int:
    return kernel_weight.nbytes + n * k


define(
    Op(
        name="int4_sparse_unpack",
        schema=(
            "(Tensor kernel_weight, int n, int k, int group_size, ScalarType scale_dtype,"
            ' str layout="8x4") -> (Tensor, Tensor)'
        ),
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)


def unsupported(
    kernel_weight: torch.Tensor,
    n: int,
    k: int,
    group_size: int,
    scale_dtype: torch.dtype,
    layout: str = CPU_LAYOUT,
) -> str | None:
    return why_not_on_cpu(kernel_weight, layout)


backend.register_kernel("int4_sparse_unpack", "cpu", unsupported=unsupported)
