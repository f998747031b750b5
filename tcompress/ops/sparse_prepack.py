"""The kernel layout of a weight with many zeros."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tcompress import backend
from tcompress.errors import message
from tcompress.kernels.triton import sparse_layout
from tcompress.ops._registry import Op, cpu_unsupported, define
from tcompress.ops.int8_prepack import MAX_LANE_SUM, PANEL, QUAD
from tcompress.ops.sparse_mma import MMA_TWO_FOUR, mma_bytes, pack_mma
from tcompress.ops.sparse_two_four import TWO_FOUR, is_two_four, pack_two_four, two_four_bytes

WORD = 64  # units whose places one word of the bitmap holds
SEGMENT = 256  # units that a position, a byte, tells apart
MAX_RUN = 64  # kept blocks added in 16 bits, at most
UNIT_BYTES = 4
CACHE_LINE = 64
PAD = 64  # bytes after the last value
#: Outputs of a block by the name of the layout; a block is one unit of each, a unit one float or four int8 along K.
LAYOUTS: dict[torch.dtype, dict[str, int]] = {
    torch.float32: {"unstructured": 1, "8x4": 8},
    torch.int8: {"1x4": 1, "8x4": 8},
}


def sparse_prepack(weight: torch.Tensor, layout: str) -> torch.Tensor:
    """Rearranges a weight with zeros into the layout that a kernel reads: of the CPU's, drawn in
    `csrc/cpu/sparse_layout.h`, or of a GPU's.

    Kept are the blocks that hold a non-zero weight: one unit, or one unit of each of eight outputs. Which they are is
    a bit for each block; the kept ones follow one another, by outputs. Derived whenever needed, and never saved.

    Args:
        weight: [N, K] float32, or int8; for a GPU's layout float16 or bfloat16 too.
        layout: float32: "unstructured" or "8x4" (8 outputs; K is free). int8: "1x4", "8x4", or "2:4" for a weight of
            which at most two in each four along K are not zero; those are kept and nothing else
            (`csrc/cpu/two_four_layout.h`). For the Triton kernels "gpu-2:4", "gpu-8x4", "gpu-16x16" or "gpu-32x16",
            with "-float16" or "-bfloat16" behind for a weight of that type (`kernels/triton/sparse_layout.py`); for the
            CUDA C++ kernel "mma-2:4", int8 (`csrc/cuda/two_four_linear.h`).

    Returns:
        One-dimensional int8 tensor; its size depends on the zeros, but not in a 2:4 layout.

    Raises:
        TypeError: a wrong dtype. ValueError: not two-dimensional, an unknown layout, or a weight that is not 2:4.
    """
    check_dtype("sparse_prepack", "weight", weight.dtype, layout)
    if weight.dim() != 2:
        raise ValueError(message("sparse_prepack", "weight", f"{weight.dim()} dimensions", "[N, K]"))
    check_layout("sparse_prepack", layout, weight.dtype)
    if is_fixed(layout) and not is_two_four(weight):
        raise ValueError(message("sparse_prepack", "weight", "more than two of four", "at most two that are not zero"))
    return backend.call("sparse_prepack", weight, layout)


def layouts_of(dtype: torch.dtype) -> tuple[str, ...]:
    """All layouts of weights of a type; 2:4 is not for any weight."""
    return (*cpu_layouts(dtype), *gpu_layouts(dtype))


def cpu_layouts(dtype: torch.dtype) -> tuple[str, ...]:
    """Those of the CPU kernels."""
    return (*LAYOUTS.get(dtype, {}), *((TWO_FOUR,) if dtype == torch.int8 else ()))


def gpu_layouts(dtype: torch.dtype) -> tuple[str, ...]:
    """Those of the kernels for GPUs."""
    return (*sparse_layout.names(dtype), *((MMA_TWO_FOUR,) if dtype == torch.int8 else ()))


def gpu_pattern(layout: str) -> str | None:
    """Of a layout of the Triton kernels what it keeps, "2:4" or "RxC"; None of another."""
    known = sparse_layout.FLOAT_LAYOUTS.get(layout)
    return known[0] if known else None


def float_type(layout: str) -> torch.dtype:
    """Of the float weights in a layout."""
    known = sparse_layout.FLOAT_LAYOUTS.get(layout)
    return known[1] if known else torch.float32


def is_fixed(layout: str) -> bool:
    """Whether its size does not depend on the zeros, for it keeps two of each four."""
    return layout in (TWO_FOUR, MMA_TWO_FOUR) or gpu_pattern(layout) == TWO_FOUR


def check_dtype(op: str, argument: str, dtype: torch.dtype, layout: str) -> None:
    """Raises unless there are weights of this type in such a layout."""
    if dtype not in LAYOUTS and layout not in sparse_layout.FLOAT_LAYOUTS:
        raise TypeError(message(op, argument, dtype, "float32 or int8", "a GPU's layouts have 16-bit floats too"))
    if dtype not in sparse_layout.SUFFIXES:
        raise TypeError(message(op, argument, dtype, "float32, float16, bfloat16 or int8"))


def check_layout(op: str, layout: str, dtype: torch.dtype) -> None:
    """Raises unless weights of this type have such a layout."""
    if layout in layouts_of(dtype):
        return
    of_gpu = f"one of {gpu_layouts(dtype)}"
    expected, hint = (f"one of {cpu_layouts(dtype)}", f"on a GPU {of_gpu}") if cpu_layouts(dtype) else (of_gpu, "")
    raise ValueError(message(op, "layout", repr(layout), f"{expected} for {dtype}", hint))


def why_not_on_cpu(x: torch.Tensor, layout: str) -> str | None:
    """Why the CPU kernels do not take a tensor and a layout, or None."""
    of_gpu = gpu_pattern(layout) is not None or layout == MMA_TWO_FOUR
    return cpu_unsupported(x) or (f"layout {layout!r}: of the kernels for GPUs" if of_gpu else None)


def parts(n: int, k: int, dtype: torch.dtype, layout: str, blocks: int) -> dict[str, int]:
    """Where the parts of the kernel layout begin, and "bytes", its size."""
    rows = -(-n // LAYOUTS[dtype][layout])
    words = -(-unit_count(k, dtype) // WORD)
    integers = dtype == torch.int8
    offsets = rows * words * 8
    column_sums = offsets + (rows + 1) * 4
    runs = column_sums + (-(-n // PANEL) * PANEL * 4 if integers else 0)
    values = -(-(runs + (rows if integers else 0)) // CACHE_LINE) * CACHE_LINE
    size = values + blocks * block_bytes(dtype, layout) + PAD
    return {"offsets": offsets, "column_sums": column_sums, "runs": runs, "values": values, "bytes": size}


def fixed_bytes(n: int, k: int, dtype: torch.dtype, layout: str) -> int:
    """Of a weight [N, K] in a 2:4 layout."""
    if layout == MMA_TWO_FOUR:
        return mma_bytes(n, k)
    return two_four_bytes(n, k) if layout == TWO_FOUR else sparse_layout.least_bytes(n, k, dtype, TWO_FOUR)


def block_bytes(dtype: torch.dtype, layout: str) -> int:
    """Of a kept block: its units, and with one output its position, a byte."""
    block_rows = LAYOUTS[dtype][layout]
    return block_rows * UNIT_BYTES + (block_rows == 1)


def unit_count(k: int, dtype: torch.dtype) -> int:
    """Units along K."""
    return -(-k // QUAD) if dtype == torch.int8 else k


def blocks_of(weight: torch.Tensor, block_rows: int) -> torch.Tensor:
    """[N, K] to int32 [R, U, block_rows], zero padded; -0.0 is 0."""
    if weight.dtype == torch.int8:
        units = F.pad(weight, (0, -weight.shape[1] % QUAD))
    else:
        units = torch.where(weight == 0, torch.zeros_like(weight), weight)
    units = F.pad(units, (0, 0, 0, -weight.shape[0] % block_rows))
    rows, count = units.shape[0] // block_rows, units.shape[1] * units.element_size() // UNIT_BYTES
    return units.reshape(-1).view(torch.int32).view(rows, block_rows, count).transpose(1, 2)


def pack_bitmap(kept: torch.Tensor) -> torch.Tensor:
    """bool [R, U] to uint8 [R, W * 8], the first unit in the lowest bit."""
    padded = F.pad(kept, (0, -kept.shape[1] % WORD))
    return (
        (padded.unflatten(1, (padded.shape[1] // 8, 8)).int() << torch.arange(8, device=kept.device))
        .sum(-1)
        .to(torch.uint8)
    )


def unpack_bitmap(bitmap: torch.Tensor, rows: int, units: int) -> torch.Tensor:
    """The inverse: int8 [R * W * 8] to bool [R, U]."""
    words = -(-units // WORD)
    bits = bitmap.view(torch.uint8).view(rows, words * 8, 1) >> torch.arange(8, device=bitmap.device) & 1
    return bits.bool().view(rows, words * WORD)[:, :units]


def reference(weight: torch.Tensor, layout: str) -> torch.Tensor:
    if layout in (TWO_FOUR, MMA_TWO_FOUR):
        return pack_two_four(weight) if layout == TWO_FOUR else pack_mma(weight)
    if (pattern := gpu_pattern(layout)) is not None:
        return sparse_layout.pack(weight, pattern)
    n, k = weight.shape
    integers = weight.dtype == torch.int8
    blocks = blocks_of(weight, LAYOUTS[weight.dtype][layout])
    kept = (blocks != 0).any(-1)
    offsets = F.pad(kept.sum(1), (1, 0)).cumsum(0).to(torch.int32)
    values = blocks[kept]
    where = parts(n, k, weight.dtype, layout, values.shape[0])
    pieces = [pack_bitmap(kept), offsets]
    if integers:
        pieces += [F.pad(weight.sum(1, dtype=torch.int32), (0, -n % PANEL)), _runs(blocks, kept)]
    head = torch.cat([piece.reshape(-1).view(torch.int8) for piece in pieces])
    head = F.pad(head, (0, where["values"] - head.numel()))
    tail = [values.reshape(-1).view(torch.int8)]
    if blocks.shape[2] == 1:
        tail.append((kept.nonzero()[:, 1] % SEGMENT).to(torch.uint8).view(torch.int8))
    return torch.cat([head, *tail, head.new_zeros(PAD)])


def _runs(blocks: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """For each block row [R]: the largest r up to `MAX_RUN` such that any r kept blocks in a row add up in 16 bits."""
    rows, units, block_rows = blocks.shape
    pairs = blocks.reshape(-1).view(torch.int8).view(rows, units, block_rows * 2, 2).int()
    lanes = torch.cat([pairs.clamp_min(0).sum(-1), (-pairs).clamp_min(0).sum(-1)], -1)
    lanes = lanes.gather(1, (~kept).int().argsort(dim=1, stable=True)[..., None].expand_as(lanes))  # kept ones first
    before = F.pad(lanes.cumsum(1), (0, 0, 1, 0)).transpose(1, 2).contiguous()
    starts = torch.arange(units + 1, device=blocks.device)
    # where a sequence from each start would first be too much, less one; the end of a block row is no bound
    ends = torch.searchsorted(before, before + MAX_LANE_SUM, right=True) - 1
    fits = torch.where(ends < units, ends - starts, MAX_RUN)
    return fits.flatten(1).amin(1).clamp_max(MAX_RUN).to(torch.uint8)


def fake(weight: torch.Tensor, layout: str) -> torch.Tensor:
    if is_fixed(layout):
        n, k = weight.shape
        return weight.new_empty(fixed_bytes(n, k, weight.dtype, layout), dtype=torch.int8)
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.int8)


def flops(weight: torch.Tensor, layout: str) -> int:
    return 4 * weight.numel()


def nbytes(weight: torch.Tensor, layout: str) -> int:
    return 2 * weight.nbytes


define(
    Op(
        name="sparse_prepack",
        schema="(Tensor weight, str layout) -> Tensor",
        reference=reference,
        fake=fake,
        tolerance=0.0,
        flops=flops,
        nbytes=nbytes,
    )
)
backend.register_kernel("sparse_prepack", "cpu", unsupported=why_not_on_cpu)
