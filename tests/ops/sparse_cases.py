"""Weights with zeros for the tests of the sparse ops, and small arguments of these; `cases.SAMPLES` takes them in."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

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
