"""A weight with many zeros out of its kernel layout."""

from __future__ import annotations

import torch

from tcompress import backend
from tcompress.errors import message
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_prepack import QUAD
from tcompress.ops.sparse_prepack import LAYOUTS, PAD, block_bytes, check_layout, parts, unit_count, unpack_bitmap
from tcompress.ops.sparse_two_four import TWO_FOUR, two_four_bytes, unpack_two_four


def sparse_unpack(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """The inverse of `sparse_prepack`: the weight [N, K], float32 or int8, bit for bit (but -0.0 is 0.0).

    Args:
        kernel_weight: the result of `sparse_prepack(weight, layout)`.
        n, k: the shape of the weight.
        dtype: its type, torch.float32 or torch.int8.
        layout: as it was packed.

    Returns:
        [N, K].

    Raises:
        TypeError: a wrong dtype. ValueError: an unknown layout, or a size that no such weight gives.
    """
    if dtype not in LAYOUTS:
        raise TypeError(message("sparse_unpack", "dtype", dtype, "torch.float32 or torch.int8"))
    check_kernel_weight("sparse_unpack", kernel_weight, n, k, dtype, layout)
    return backend.call("sparse_unpack", kernel_weight, n, k, dtype, layout)


def check_kernel_weight(op: str, kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> None:
    """Raises unless `kernel_weight` can be the kernel layout of a weight [N, K]."""
    check_layout(op, layout, dtype)
    if kernel_weight.dtype != torch.int8:
        raise TypeError(message(op, "kernel_weight", kernel_weight.dtype, "int8, from sparse_prepack"))
    if layout == TWO_FOUR:
        size = two_four_bytes(n, k) if min(n, k) >= 0 else -1
        if kernel_weight.shape != (size,):
            expected = f"[{size}] for N={n}, K={k}" if size >= 0 else "sizes of at least 0"
            raise ValueError(message(op, "kernel_weight", list(kernel_weight.shape), expected, "from sparse_prepack"))
        return
    least = parts(n, k, dtype, layout, 0)["bytes"] if min(n, k) >= 0 else 0
    block = block_bytes(dtype, layout)
    size = kernel_weight.numel()
    if min(n, k) < 0 or kernel_weight.dim() != 1 or size < least or (size - least) % block:
        expected = f"[{least} + {block} a block] for N={n}, K={k}"
        raise ValueError(message(op, "kernel_weight", list(kernel_weight.shape), expected, "from sparse_prepack"))


def reference(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    if layout == TWO_FOUR:
        return unpack_two_four(kernel_weight, n, k)
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
backend.register_kernel("sparse_unpack", "cpu", unsupported=cpu_unsupported)
