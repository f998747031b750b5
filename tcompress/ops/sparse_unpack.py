"""A weight with many zeros out of its kernel layout."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.kernels.triton import sparse_layout
from tcompress.ops._registry import Op, define
from tcompress.ops.int8_prepack import QUAD
from tcompress.ops.sparse_mma import MMA_TWO_FOUR, unpack_mma
from tcompress.ops.sparse_prepack import (
    LAYOUTS,
    PAD,
    block_bytes,
    check_dtype,
    check_layout,
    fixed_bytes,
    gpu_pattern,
    is_fixed,
    parts,
    unit_count,
    unpack_bitmap,
    why_not_on_cpu,
)
from tcompress.ops.sparse_two_four import TWO_FOUR, unpack_two_four


def sparse_unpack(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """The inverse of `sparse_prepack`: the weight [N, K] bit for bit (but -0.0 is 0.0).

    Args:
        kernel_weight: the result of `sparse_prepack(weight, layout)`.
        n, k: the shape of the weight.
        dtype: its type, torch.float32 or torch.int8, or what a GPU's layout has.
        layout: as it was packed.

    Returns:
        [N, K].

    Raises:
        TypeError: a wrong dtype. ValueError: an unknown layout, or a size that no such weight gives.
    """
    check_dtype("sparse_unpack", "dtype", dtype, layout)
    check_kernel_weight("sparse_unpack", kernel_weight, n, k, dtype, layout)
    return backend.call("sparse_unpack", kernel_weight, n, k, dtype, layout)


def check_kernel_weight(op: str, kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> None:
    """Raises unless `kernel_weight` can be the kernel layout of a weight [N, K]."""
    check_layout(op, layout, dtype)
    if kernel_weight.dtype != torch.int8:
        raise TypeError(message(op, "kernel_weight", kernel_weight.dtype, "int8, from sparse_prepack"))
    if is_fixed(layout):
        size = fixed_bytes(n, k, dtype, layout) if min(n, k) >= 0 else -1
        if kernel_weight.shape != (size,):
            expected = f"[{size}] for N={n}, K={k}" if size >= 0 else "sizes of at least 0"
            raise ValueError(message(op, "kernel_weight", list(kernel_weight.shape), expected, "from sparse_prepack"))
        return
    pattern = gpu_pattern(layout)
    if pattern is None:
        least, block = parts(max(n, 0), max(k, 0), dtype, layout, 0)["bytes"], block_bytes(dtype, layout)
    else:
        least = sparse_layout.least_bytes(max(n, 0), max(k, 0), dtype, pattern)
        block = sparse_layout.block_bytes(dtype, pattern)
    size = kernel_weight.numel()
    if min(n, k) < 0 or kernel_weight.dim() != 1 or size < least or (size - least) % block:
        expected = f"[{least} + {block} a block] for N={n}, K={k}"
        raise ValueError(message(op, "kernel_weight", list(kernel_weight.shape), expected, "from sparse_prepack"))


def reference(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout in (TWO_FOUR, MMA_TWO_FOUR):
        return (unpack_two_four if layout == TWO_FOUR else unpack_mma)(kernel_weight, n, k)
    if (pattern := gpu_pattern(layout)) is not None:
        return sparse_layout.unpack(kernel_weight, n, k, dtype, pattern)
    block_rows, units = LAYOUTS[dtype][layout], unit_count(k, dtype)
    rows = -(-n // block_rows)
    where = parts(n, k, dtype, layout, 0)
    kept = unpack_bitmap(kernel_weight[: where["offsets"]], rows, units)
    count = (kernel_weight.numel() - PAD - where["values"]) // block_bytes(dtype, layout)
    values = kernel_weight[where["values"] :][: count * block_rows * 4].view(torch.int32).view(-1, block_rows)
    blocks = kernel_weight.new_zeros((rows, units, block_rows), dtype=torch.int32)
    blocks[kept] = values
    weight = blocks.transpose(1, 2).reshape(-1).view(dtype)
    return weight.view(rows * block_rows, units * (QUAD if dtype == torch.int8 else 1))[:n, :k].contiguous()


def fake(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    return kernel_weight.new_empty((n, k), dtype=dtype)


def flops(kernel_weight: torch.Tensor, *args: object) -> int:
    return 0


def nbytes(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> int:
    return kernel_weight.nbytes + n * k * dtype.itemsize


define(
    Op(
        name="sparse_unpack",
        schema="(Tensor kernel_weight, int n, int k, ScalarType dtype, str layout) -> Tensor",
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)


def cpu_unsupported(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> str | None:
    return why_not_on_cpu(kernel_weight, layout)


backend.register_kernel("sparse_unpack", "cpu", unsupported=cpu_unsupported)
