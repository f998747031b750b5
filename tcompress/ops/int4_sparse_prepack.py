"""The kernel layout of a 4-bit weight whose zeros come in blocks of 8 outputs x 4 inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress import backend
from tcompress.errors import message
from tcompress.kernels.triton import int4_sparse_layout
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int4_prepack import check_weight
from tcompress.ops.sparse_prepack import CACHE_LINE, PAD, QUAD, WORD, blocks_of, pack_bitmap

BLOCK_ROWS = 8
BLOCK_BYTES = BLOCK_ROWS * QUAD // 2
ZERO = 8  # stored nibble that means 0
#: Of the CPU kernels.
CPU_LAYOUT = "8x4"
LAYOUTS = (CPU_LAYOUT, *int4_sparse_layout.LAYOUTS)


def int4_sparse_prepack(
    weight: torch.Tensor, weight_scale: torch.Tensor, group_size: int, layout: str = CPU_LAYOUT
) -> torch.Tensor:
    """Rearranges a 4-bit weight with zeros into what a kernel reads: of the CPU's, drawn in
    `csrc/cpu/int4_sparse_layout.h`, or of a GPU's.

    Kept are the blocks of 8 outputs x 4 inputs that hold a non-zero weight, in 16 bytes each; which they are is a bit
    for each block. Derived whenever needed, and never saved.

    Args:
        weight: [N, K] int8, -8 to 7.
        weight_scale: [N, ceil(K/g)] float16 or float32, finite.
        group_size: g: 32, 64, 128, 256, 512, or K and more for one scale a channel.
        layout: "8x4", or for the Triton kernel "gpu-8x4" or "gpu-16x16" (`kernels/triton/int4_sparse_layout.py`).

    Returns:
        One-dimensional int8 tensor; its size depends on the zeros.

    Raises:
        TypeError: a wrong dtype. ValueError: shapes that do not fit, a group size that no kernel has, a weight that
            4 bits do not hold.
    """
    op = "int4_sparse_prepack"
    check_layout(op, layout)
    if weight.dtype != torch.int8:
        raise TypeError(message(op, "weight", weight.dtype, "int8"))
    if weight.dim() != 2:
        raise ValueError(message(op, "weight", f"{weight.dim()} dimensions", "[N, K]"))
    check_weight(op, None, weight_scale, None, weight.shape[1], group_size)
    if weight.shape[0] != weight_scale.shape[0]:
        expected = f"[{weight.shape[0]}, ceil(K/g)]"
        raise ValueError(message(op, "weight_scale", list(weight_scale.shape), expected))
    if weight.numel():
        lowest, highest = (int(bound) for bound in weight.aminmax())
        if lowest < -ZERO or highest >= ZERO:
            raise ValueError(message(op, "weight", f"values from {lowest} to {highest}", "-8 to 7"))
    return backend.call(op, weight, weight_scale, group_size, layout)


def check_layout(op: str, layout: str) -> None:
    """Raises unless there is such a layout."""
    if layout not in LAYOUTS:
        raise ValueError(message(op, "layout", repr(layout), f"one of {LAYOUTS}"))


def why_not_on_cpu(x: torch.Tensor, layout: str) -> str | None:
    """Why the CPU kernels do not take a tensor and a layout, or None."""
    return cpu_unsupported(x) or (None if layout == CPU_LAYOUT else f"layout {layout!r}: of the kernels for GPUs")


def parts(n: int, k: int, group_size: int, scale_bytes: int, blocks: int) -> dict[str, int]:
    """Where the parts of the kernel layout begin, and "bytes", its size."""
    rows, words = -(-n // BLOCK_ROWS), -(-k // (QUAD * WORD))
    offsets = rows * words * 8
    scales = offsets + (rows + 1) * 4
    scales_end = scales + rows * -(-k // group_size) * BLOCK_ROWS * scale_bytes
    values = -(-scales_end // CACHE_LINE) * CACHE_LINE
    return {"offsets": offsets, "scales": scales, "values": values, "bytes": values + blocks * BLOCK_BYTES + PAD}


def reference(
    weight: torch.Tensor, weight_scale: torch.Tensor, group_size: int, layout: str = CPU_LAYOUT
) -> torch.Tensor:
    if layout != CPU_LAYOUT:
        return int4_sparse_layout.pack(weight, weight_scale, group_size, int4_sparse_layout.LAYOUTS[layout])
    n, k = weight.shape
    blocks = blocks_of(weight, BLOCK_ROWS)
    kept = (blocks != 0).any(-1)
    offsets = F.pad(kept.sum(1), (1, 0)).cumsum(0).to(torch.int32)
    scale = F.pad(weight_scale, (0, 0, 0, -n % BLOCK_ROWS)).unflatten(0, (-1, BLOCK_ROWS)).transpose(1, 2)
    integers = blocks[kept].view(torch.int8).view(-1, 2, BLOCK_BYTES)  # low nibbles, high nibbles
    nibbles = (integers + ZERO).view(torch.uint8)
    where = parts(n, k, group_size, weight_scale.element_size(), len(nibbles))
    head = torch.cat([p.contiguous().view(-1).view(torch.int8) for p in (pack_bitmap(kept), offsets, scale)])
    values = nibbles[:, 0] | (nibbles[:, 1] << 4)
    return torch.cat(
        [F.pad(head, (0, where["values"] - head.numel())), F.pad(values.reshape(-1).view(torch.int8), (0, PAD))]
    )


def fake(weight: torch.Tensor, weight_scale: torch.Tensor, group_size: int, layout: str = CPU_LAYOUT) -> torch.Tensor:
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int8)


def flops(weight: torch.Tensor, *args: object) -> int:
    return 0


def nbytes(weight: torch.Tensor, weight_scale: torch.Tensor, *args: object) -> int:
    return 2 * (weight.nbytes + weight_scale.nbytes)


define(
    Op(
        name="int4_sparse_prepack",
        schema='(Tensor weight, Tensor weight_scale, int group_size, str layout="8x4") -> Tensor',
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)


def unsupported(
    weight: torch.Tensor, weight_scale: torch.Tensor, group_size: int, layout: str = CPU_LAYOUT
) -> str | None:
    return why_not_on_cpu(weight, layout)


backend.register_kernel("int4_sparse_prepack", "cpu", unsupported=unsupported)
