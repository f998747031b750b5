"""How the GPU's kernels hold a sparse weight: one tensor of bytes, whose parts begin at multiples of 64.

    gpu-RxC  blocks of R outputs x C inputs that are not all zero, row by row; B of them
        start  [ceil(N/R) + 1] int32    the first block of each row of blocks
        sum    [N] int32                of the weights of an output; int8 alone has it
        value  [B][R][C]                what lies beyond N or K is zero
        column [B] int32                where along K a block lies, in blocks

    gpu-2:4  quads of 4 inputs, G = ceil(K/4)
        sum    [N] int32                as above
        value  [N][G][2]                the two kept ones; the first zeros of a quad that has fewer
        index  [ceil(N · G / 2)]        their places, a nibble a quad: p0 | p1 << 2

Values are int8 or float32, or what the name ends with: gpu-2:4-float16. Plain torch; nothing but `pack` of blocks waits
for a GPU, and no kernel is needed to read a weight back.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F

PREFIX = "gpu-"
TWO_FOUR = "2:4"
PATTERNS = (TWO_FOUR, "8x4", "16x16", "32x16")
ALIGNMENT = 64
QUAD = 4
#: What a layout's name ends with, by the type of the values.
SUFFIXES = {torch.int8: "", torch.float32: "", torch.float16: "-float16", torch.bfloat16: "-bfloat16"}
#: Why the Triton kernels do not read another layout.
NOT_OURS = "layout {!r}: the Triton kernels read those that begin with 'gpu-' (sparse_prepack)"


class Parts(NamedTuple):
    """Views of a packed weight. `start` and `column` of blocks, `places` (the index) of 2:4, `total` (the sums) of
    int8."""

    values: torch.Tensor
    total: torch.Tensor | None
    start: torch.Tensor | None = None
    column: torch.Tensor | None = None
    places: torch.Tensor | None = None


def name_of(pattern: str, dtype: torch.dtype) -> str:
    """The layout of a weight of this type in blocks or in 2:4."""
    return PREFIX + pattern + SUFFIXES[dtype]


def names(dtype: torch.dtype) -> tuple[str, ...]:
    """All layouts of weights of a type."""
    return tuple(name_of(pattern, dtype) for pattern in PATTERNS)


#: Pattern and type of the values by layout; those without a suffix are of int8 too.
FLOAT_LAYOUTS = {
    name_of(pattern, dtype): (pattern, dtype) for dtype in SUFFIXES if dtype.is_floating_point for pattern in PATTERNS
}
INT8_LAYOUTS = {name_of(pattern, torch.int8): (pattern, torch.int8) for pattern in PATTERNS}


def block_size(pattern: str) -> tuple[int, int]:
    """(R, C)."""
    r, c = pattern.split("x")
    return int(r), int(c)


def to_multiple(size: int) -> int:
    """Where the part after so many bytes begins."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def least_bytes(n: int, k: int, dtype: torch.dtype, pattern: str) -> int:
    """Of a weight without blocks, or of one in 2:4."""
    total = to_multiple(4 * n) if dtype == torch.int8 else 0
    if pattern == TWO_FOUR:
        quads = -(-k // QUAD)
        return total + to_multiple(n * quads * 2 * dtype.itemsize) + (n * quads + 1) // 2
    return to_multiple(4 * (-(-n // block_size(pattern)[0]) + 1)) + total


def block_bytes(dtype: torch.dtype, pattern: str) -> int:
    """Of one more block; 0 for 2:4, which has none."""
    if pattern == TWO_FOUR:
        return 0
    r, c = block_size(pattern)
    return r * c * dtype.itemsize + 4


@lru_cache(maxsize=4096)  # a layer asks at each call
def _places(n: int, k: int, dtype: torch.dtype, pattern: str, size: int) -> tuple[tuple[int, int], ...]:
    """From which byte to which: start, sum, value, and column or index. A part that is not there is empty."""
    start = 4 * (-(-n // block_size(pattern)[0]) + 1) if pattern != TWO_FOUR else 0
    total = 4 * n if dtype == torch.int8 else 0
    at = to_multiple(start)
    values = at + to_multiple(total)
    if pattern == TWO_FOUR:
        end = values + n * -(-k // QUAD) * 2 * dtype.itemsize
        last = to_multiple(end)
    else:
        end = last = size - 4 * ((size - values) // block_bytes(dtype, pattern))
    return (0, start), (at, at + total), (values, end), (last, size)


def parts(packed: torch.Tensor, n: int, k: int, dtype: torch.dtype, pattern: str) -> Parts:
    """Views; looks at the size alone."""
    start, total, values, last = _places(n, k, dtype, pattern, packed.numel())
    value = packed[slice(*values)].view(dtype)
    sums = packed[slice(*total)].view(torch.int32) if dtype == torch.int8 else None
    if pattern == TWO_FOUR:
        return Parts(value, sums, places=packed[slice(*last)].view(torch.uint8))
    return Parts(value, sums, packed[slice(*start)].view(torch.int32), packed[slice(*last)].view(torch.int32))


def pack(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    """[N, K], int8 or a float type, to the layout. -0.0 counts as zero. 2:4: the weight has that pattern."""
    # as integers: some of torch's copies rewrite a NaN
    weight = weight.view(_bits(weight.dtype)).masked_fill(weight == 0, 0)
    pieces = []
    if pattern == TWO_FOUR:
        values, nibbles = quads(weight)
        pairs = F.pad(nibbles.flatten(), (0, nibbles.numel() % 2)).view(-1, 2)
        index = pairs[:, 0] | pairs[:, 1] << 4
    else:
        blocks, start, column = _blocks(weight, pattern)
        pieces.append(start)
        values, index = blocks, column
    if weight.dtype == torch.int8:
        pieces.append(weight.sum(1, dtype=torch.int32))
    # 2:4 has a last part that begins at a multiple; that of blocks follows the values as it is
    pieces += [values, index] if pattern == TWO_FOUR else [torch.cat([as_bytes(values), as_bytes(index)])]
    return torch.cat([*map(padded_bytes, pieces[:-1]), as_bytes(pieces[-1])])


def unpack(packed: torch.Tensor, n: int, k: int, dtype: torch.dtype, pattern: str) -> torch.Tensor:
    """The inverse of `pack`."""
    found = parts(packed, n, k, dtype, pattern)
    values = found.values.view(_bits(dtype))
    if pattern == TWO_FOUR:
        assert found.places is not None
        count = -(-k // QUAD)
        nibbles = torch.stack([found.places & 15, found.places >> 4], 1).flatten()[: n * count].view(n, count)
        return dense_of_quads(values.view(n, count, 2), nibbles)[:, :k].contiguous().view(dtype)
    assert found.start is not None
    assert found.column is not None
    r, c = block_size(pattern)
    rows, columns = -(-n // r), -(-k // c)
    place = torch.arange(found.column.numel(), dtype=torch.int32, device=packed.device)
    row = torch.searchsorted(found.start[1:], place, right=True)
    grid = values.new_zeros(rows * columns, r, c)
    grid[row * columns + found.column] = values.view(-1, r, c)
    dense = grid.view(rows, columns, r, c).transpose(1, 2).reshape(rows * r, columns * c)
    return dense[:n, :k].contiguous().view(dtype)


def kept_blocks(weight: torch.Tensor, pattern: str) -> float:
    """Of the blocks of a weight that is not empty the part that is not all zero."""
    return float((_grid(weight, pattern) != 0).flatten(2).any(2).float().mean())


def _grid(weight: torch.Tensor, pattern: str) -> torch.Tensor:
    """[ceil(N/R), ceil(K/C), R, C], zero beyond N and K."""
    (n, k), (r, c) = weight.shape, block_size(pattern)
    padded = F.pad(weight, (0, -k % c, 0, -n % r))
    return padded.view(padded.shape[0] // r, r, padded.shape[1] // c, c).transpose(1, 2)


def _blocks(weight: torch.Tensor, pattern: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kept blocks [B, R, C], and the start and column of the layout."""
    grid = _grid(weight, pattern)
    kept = (grid != 0).flatten(2).any(2)
    start = F.pad(kept.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return grid[kept], start, kept.nonzero()[:, 1].to(torch.int32)


def quads(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of a 2:4 weight of integers [N, K]: values [N, G, 2], and their places, nibbles [N, G] uint8."""
    n, k = weight.shape
    four = F.pad(weight, (0, -k % QUAD)).view(n, -(-k // QUAD), QUAD)
    # what is not zero comes first, and of equals the lower place
    places = torch.argsort((four == 0).to(torch.uint8), dim=2, stable=True)[..., :2].sort(2).values
    return four.gather(2, places), (places[..., 0] | places[..., 1] << 2).to(torch.uint8)


def dense_of_quads(values: torch.Tensor, nibbles: torch.Tensor) -> torch.Tensor:
    """The inverse of `quads`: [N, 4 · G]."""
    places = torch.stack([nibbles & 3, nibbles >> 2], 2).long()
    return values.new_zeros(*nibbles.shape, QUAD).scatter(2, places, values).flatten(1)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """The integers of the same size."""
    return {1: torch.int8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def as_bytes(piece: torch.Tensor) -> torch.Tensor:
    """int8, one-dimensional."""
    return piece.contiguous().view(-1).view(torch.int8)


def padded_bytes(piece: torch.Tensor) -> torch.Tensor:
    """`as_bytes` up to where the next part begins."""
    size = piece.numel() * piece.element_size()
    return F.pad(as_bytes(piece), (0, to_multiple(size) - size))
