"""Weights with zeros for the tests of the sparse ops, and small arguments of these; `cases.SAMPLES` takes them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from tcompress.ops._registry import OPS

LAYOUTS: dict[torch.dtype, tuple[str, ...]] = {torch.float32: ("unstructured", "8x4"), torch.int8: ("1x4", "8x4")}
FORMS = tuple((dtype, layout) for dtype, layouts in LAYOUTS.items() for layout in layouts)
BLOCK_ROWS = {"unstructured": 1, "1x4": 1, "8x4": 8}

# What the layout cuts a weight into: outputs in block rows of 8, panels of 16 and groups of 48; K in fours (int8), and
# words of 64 units, which are 64 floats or 256 int8. A tile takes 8 words of block rows of 8, and of block rows of 1 as
# many as the first-level cache holds, from two on.
SIZES = (
    (0, 0),
    (0, 8),
    (16, 0),
    (1, 1),
    (1, 3),
    (1, 300),
    (7, 4),
    (8, 5),
    (9, 63),
    (16, 64),
    (17, 65),
    (47, 127),
    (48, 128),
    (49, 255),
    (50, 256),
    (97, 257),
    (9, 1030),
    (18, 2300),
)


def generator(name: object) -> torch.Generator:
    """The same numbers for the same name, on every run."""
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(str(name))) % 2**31)


# ---- which weights are kept: (n, k) -> bool [n, k] ------------------------------------------------------------------

Pattern = Callable[[int, int], torch.Tensor]


def _random(density: float) -> Pattern:
    return lambda n, k: torch.rand(n, k, generator=generator((n, k, density))) < density


def _empty_rows(n: int, k: int) -> torch.Tensor:
    """Every third output, and all outputs of the second block row of 8."""
    keep = _random(0.3)(n, k)
    keep[::3] = False
    keep[8:16] = False
    return keep


def _blocks(n: int, k: int) -> torch.Tensor:
    """8 outputs x 4 inputs."""
    rows, columns = -(-n // 8), -(-k // 4)
    return _random(0.2)(rows, columns).repeat_interleave(8, 0).repeat_interleave(4, 1)[:n, :k]


def _last_output(n: int, k: int) -> torch.Tensor:
    """All that is kept, so that threads which share the outputs have very different shares."""
    return (torch.arange(n) == n - 1)[:, None].repeat(1, k)


PATTERNS: dict[str, Pattern] = {
    "5 %": _random(0.05),
    "half": _random(0.5),
    "full": lambda n, k: torch.ones(n, k, dtype=torch.bool),
    "nothing": lambda n, k: torch.zeros(n, k, dtype=torch.bool),
    "empty rows": _empty_rows,
    "2 of 4": lambda n, k: (torch.arange(k) % 4 < 2).repeat(n, 1),
    "8x4 blocks": _blocks,
    "last input": lambda n, k: (torch.arange(k) == k - 1).repeat(n, 1),
    "last output": _last_output,
    "every 64th input": lambda n, k: (torch.arange(k) % 64 == 0).repeat(n, 1),
    "every 256th input": lambda n, k: (torch.arange(k) % 256 == 255).repeat(n, 1),
    "diagonal": lambda n, k: (torch.arange(n)[:, None] - torch.arange(k)) % 13 == 0,
}


def weight(n: int, k: int, dtype: torch.dtype, pattern: str = "half") -> torch.Tensor:
    """[N, K], ordinary numbers where the pattern keeps them."""
    g = generator((n, k, pattern))
    if dtype == torch.int8:
        dense = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=g)
    else:
        dense = torch.randn(n, k, generator=g)
    return dense.masked_fill(~PATTERNS[pattern](n, k), 0)


# ---- small arguments of each op, in the order of its schema ---------------------------------------------------------


def _weights(dtype: torch.dtype) -> Iterator[tuple[torch.Tensor, str]]:
    for n, k in ((17, 70), (0, 8), (16, 0), (1, 1), (49, 257)):
        for layout in LAYOUTS[dtype]:
            yield weight(n, k, dtype), layout


def _prepack() -> Iterator[tuple[Any, ...]]:
    for dtype in LAYOUTS:
        yield from _weights(dtype)
        yield (weight(70, 18, dtype).t(), "8x4")


def _unpack() -> Iterator[tuple[Any, ...]]:
    for w, layout in _prepack():
        yield (torch.ops.tcompress.sparse_prepack(w, layout), *w.shape, w.dtype, layout)


def _linear(dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    integers = dtype == torch.int8
    for w, layout in _weights(dtype):
        n, k = w.shape
        g = generator((n, k))
        x, bias = torch.randn(11, k, generator=g), torch.randn(n, generator=g)
        packed = torch.ops.tcompress.sparse_prepack(w, layout)
        size: tuple[Any, ...] = (torch.rand(n, generator=g) * 0.02 + 1e-4,) if integers else (n,)
        w8a8, w8a7, a4 = ((8, True), (7, False), (4, True)) if integers else ((), (), ())
        yield (x, packed, *size, None, layout, *w8a8, "none", None)
        yield (x[:3].bfloat16(), packed, *size, bias.half(), layout, *w8a7, "gelu", torch.float32)
        yield (x.half()[:0], packed, *size, bias, layout, *a4, "silu", None)
        if integers:
            yield (x, packed, *size, bias, layout, *a4, "relu", torch.int32)
        strided, residual = x.t().contiguous().t()[None], bias.half().expand(1, 11, n)
        yield (strided, packed, *size, bias, layout, *w8a8, "gelu_tanh", torch.float16, residual)


SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "sparse_prepack": tuple(_prepack()),
    "sparse_unpack": tuple(_unpack()),
    "sparse_linear": tuple(_linear(torch.float32)),
    "int8_sparse_linear": tuple(_linear(torch.int8)),
}


# ---- the same in the layouts of GPUs' kernels, which the CPU's do not take -------------------------------------------

GPU_PATTERNS = ("2:4", "8x4", "16x16", "32x16")
SUFFIXES = {torch.int8: "", torch.float32: "", torch.float16: "-float16", torch.bfloat16: "-bfloat16"}
GPU_FORMS = tuple((dtype, f"gpu-{pattern}{suffix}") for dtype, suffix in SUFFIXES.items() for pattern in GPU_PATTERNS)


def gpu_weight(n: int, k: int, dtype: torch.dtype, layout: str) -> torch.Tensor:
    """[N, K] with what the layout needs: two of four, or a few blocks of 16 x 16, among them a whole row of zeros."""
    g = generator((n, k, layout))
    if layout.endswith("2:4") or "2:4-" in layout:
        keep = (torch.rand(n, -(-k // 4), 4, generator=g).argsort(-1) < 2).flatten(1)[:, :k]
        keep &= torch.rand(n, k, generator=g) < 0.9
    else:
        blocks = torch.rand(-(-n // 16), -(-k // 16), generator=g) < 0.5
        blocks[1:2] = False
        keep = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)[:n, :k]
    dense = weight(n, k, torch.int8, "full") if dtype == torch.int8 else weight(n, k, torch.float32, "full").to(dtype)
    return dense.masked_fill(~keep, 0)


def _gpu_prepack() -> Iterator[tuple[Any, ...]]:
    for dtype, layout in (*GPU_FORMS, (torch.int8, "mma-2:4")):
        for n, k in ((17, 70), (1, 1)):
            yield gpu_weight(n, k, dtype, layout), layout
    for layout in ("gpu-2:4", "gpu-8x4", "mma-2:4"):
        for n, k in ((0, 8), (16, 0), (49, 257)):
            yield gpu_weight(n, k, torch.int8, layout), layout
    yield gpu_weight(70, 18, torch.float32, "gpu-8x4").t(), "gpu-16x16"


def _gpu_unpack() -> Iterator[tuple[Any, ...]]:
    for w, layout in _gpu_prepack():
        yield OPS["sparse_prepack"].reference(w, layout), *w.shape, w.dtype, layout


def _gpu_linear(integers: bool) -> Iterator[tuple[Any, ...]]:
    for w, layout in _gpu_prepack():
        if (w.dtype == torch.int8) != integers or (w.shape == (1, 1) and "16x16" not in layout):
            continue
        (n, k), g = w.shape, generator((*w.shape, layout))
        x, bias = torch.randn(11, k, generator=g), torch.randn(n, generator=g)
        packed = OPS["sparse_prepack"].reference(w, layout)
        size: tuple[Any, ...] = (torch.rand(n, generator=g) * 0.02 + 1e-4,) if integers else (n,)
        w8a8, w8a7, a4 = ((8, True), (7, False), (4, True)) if integers else ((), (), ())
        yield (x, packed, *size, None, layout, *w8a8, "none", None)
        yield (x[:3].bfloat16(), packed, *size, bias.half(), layout, *w8a7, "gelu", torch.float32)
        yield (x.half()[:0], packed, *size, bias, layout, *a4, "silu", None)
        if integers:
            yield (x, packed, *size, bias, layout, *w8a7, "relu", torch.int32)
        strided, residual = x.half().t().contiguous().t()[None], bias.half().expand(1, 11, n)
        yield (strided, packed, *size, bias, layout, *a4, "gelu_tanh", torch.float16, residual)


GPU_SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "sparse_prepack": tuple(_gpu_prepack()),
    "sparse_unpack": tuple(_gpu_unpack()),
    "sparse_linear": tuple(_gpu_linear(False)),
    "int8_sparse_linear": tuple(_gpu_linear(True)),
}
