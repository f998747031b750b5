"""Small arguments of the ops whose activations have one scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

_SCALE = torch.tensor(0.02)


def _zero_point(symmetric: bool) -> torch.Tensor | None:
    return None if symmetric else torch.tensor(40, dtype=torch.int32)


def _inputs() -> Iterator[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    yield torch.randn(3, 20, generator=generator)
    yield torch.randn(3, 2, 7, generator=generator).half().transpose(0, 1)
    yield torch.randn(0, 4).bfloat16()
    yield torch.randn(1, 2, 0)


def _quantize() -> Iterator[tuple[Any, ...]]:
    for x in _inputs():
        for bits, symmetric in ((8, True), (7, False)):
            yield (x, _SCALE, _zero_point(symmetric), bits, symmetric)
    yield (x, _SCALE[None], _zero_point(False)[None], 8, False)  # type: ignore[index]


def _linear() -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(1)
    for x in _inputs():
        weight = torch.randint(-128, 128, (17, x.shape[-1]), dtype=torch.int8, generator=generator)
        scale, bias = torch.rand(17, generator=generator), torch.randn(17, generator=generator)
        packed, residual = torch.ops.tcompress.int8_prepack(weight), bias.half().expand(*x.shape[:-1], 17)
        symmetric = _SCALE, _zero_point(True)
        yield (x, *symmetric, weight, scale, None, None, 8, True, "none", None)
        yield (x, *symmetric, None, scale, bias, packed, 5, True, "silu", torch.float16, residual)
        yield (x, _SCALE, _zero_point(False), weight, scale, bias, packed, 7, False, "gelu", torch.int32)


SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "quantize_static": tuple(_quantize()),
    "int8_linear_static": tuple(_linear()),
}
