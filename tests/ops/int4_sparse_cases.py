"""Cases of the int4 ops for weights with blocks of zeros."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from tcompress.ops._registry import OPS
from tcompress.packing.int4 import pack_int4

#: (n, k): blocks of 8 x 4, words of 256, K off the quad, one output, nothing.
SIZES = ((0, 8), (8, 0), (1, 1), (7, 3), (8, 4), (9, 5), (48, 256), (50, 257), (97, 520), (130, 1030))
KEPT = {"empty": 0.0, "rare": 0.05, "half": 0.5, "full": 1.0}
GROUPS = (32, 128, 256, 65536)


def generator(name: object) -> torch.Generator:
    """The same numbers for the same name, on every run."""
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(str(name))) % 2**31)


def weight(n: int, k: int, kept: str = "half") -> torch.Tensor:
    """int8 [N, K] in -8 … 7 with blocks of 8 x 4 zeros."""
    g = generator((n, k, kept, "int4"))
    blocks = torch.rand(-(-n // 8), -(-k // 4), generator=g) < KEPT[kept]
    dense = torch.randint(-8, 8, (n, k), dtype=torch.int8, generator=g)
    return dense * blocks.repeat_interleave(8, 0)[:n].repeat_interleave(4, 1)[:, :k]


def scales(n: int, k: int, group_size: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    """[N, ceil(K/g)], of ordinary size."""
    groups = -(-k // group_size)
    return (torch.rand(n, groups, generator=generator((n, k, group_size))) * 0.02 + 1e-3).to(dtype)


def nibbles(w: torch.Tensor) -> torch.Tensor:
    """The same weight as the dense op takes it."""
    return pack_int4((w + 8).to(torch.uint8))


def _prepack() -> Iterator[tuple[Any, ...]]:
    for (n, k), group_size in zip(SIZES, GROUPS * 3, strict=False):
        yield weight(n, k), scales(n, k, group_size), group_size


def _unpack() -> Iterator[tuple[Any, ...]]:
    for w, scale, group_size in _prepack():
        packed = torch.ops.tcompress.int4_sparse_prepack(w, scale, group_size)
        yield packed, *w.shape, group_size, scale.dtype


def _linear() -> Iterator[tuple[Any, ...]]:
    for packed, n, k, group_size, dtype in _unpack():
        g = generator((n, k))
        x, bias = torch.randn(11, k, generator=g), torch.randn(n, generator=g)
        yield x, packed, n, None, group_size, dtype, 8, True, "none", None
        yield x[:3].bfloat16(), packed, n, bias.half(), group_size, dtype, 7, False, "gelu", torch.float32
        residual = torch.randn(2, n, generator=g).half()
        yield x.half()[:2], packed, n, bias, group_size, dtype, 4, True, "silu", None, residual


SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "int4_sparse_prepack": tuple(_prepack()),
    "int4_sparse_unpack": tuple(_unpack()),
    "int4_sparse_linear": tuple(_linear()),
}


# ---- the same in the layouts of GPUs' kernels, which the CPU's do not take -------------------------------------------

GPU_LAYOUTS = ("gpu-8x4", "gpu-16x16")


def _gpu_prepack() -> Iterator[tuple[Any, ...]]:
    for layout in GPU_LAYOUTS:
        for w, scale, group_size in list(_prepack())[:8]:  # the larger ones take the interpreter seconds
            yield w, scale.float() if len(w) % 2 else scale, group_size, layout


def _gpu_unpack() -> Iterator[tuple[Any, ...]]:
    for w, scale, group_size, layout in _gpu_prepack():
        packed = OPS["int4_sparse_prepack"].reference(w, scale, group_size, layout)
        yield packed, *w.shape, group_size, scale.dtype, layout


def _gpu_linear() -> Iterator[tuple[Any, ...]]:
    for packed, n, k, group_size, dtype, layout in _gpu_unpack():
        g = generator((n, k))
        x, bias = torch.randn(11, k, generator=g), torch.randn(n, generator=g)
        yield x, packed, n, None, group_size, dtype, 8, True, "none", None, None, layout
        yield x[:3].bfloat16(), packed, n, bias.half(), group_size, dtype, 7, False, "gelu", torch.float32, None, layout
        residual = torch.randn(2, n, generator=g).half()
        yield x.half()[:2], packed, n, bias, group_size, dtype, 4, True, "silu", None, residual, layout


GPU_SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "int4_sparse_prepack": tuple(_gpu_prepack()),
    "int4_sparse_unpack": tuple(_gpu_unpack()),
    "int4_sparse_linear": tuple(_gpu_linear()),
}
