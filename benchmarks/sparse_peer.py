"""Our sparse linear layers, and what a compared one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from linear_peer import LinearPeer, quantize_groups
from peer import Call, CannotRun
from shapes import LinearShape, SparseShape
from sparse import in_blocks

INT4_GROUP = 128


@dataclass(frozen=True)
class SparsePeer(LinearPeer):
    """A linear layer that leaves out zeros."""

    def read_bytes(self, shape: LinearShape) -> int:
        """Of the weights that are not zero. What a library stores beside them is its own affair, and not counted."""
        assert isinstance(shape, SparseShape)
        return round(shape.n * shape.k * (1 - shape.sparsity)) * self.bits // 8


def need_blocks(w: torch.Tensor, layout: str) -> None:
    """Raises `CannotRun` where the kernel would keep many zeros: blocks of several outputs, or 2:4."""
    if layout == "8x4" and not in_blocks(w, 8, 4):
        raise CannotRun("the zeros are not in blocks of 8x4")
    if layout == "2:4" and int((w != 0).unflatten(1, (-1, 4)).sum(2).max()) > 2:
        raise CannotRun("more than two of four weights are not zero")


def _op(name: str) -> Callable[..., torch.Tensor]:
    from tcompress import ops

    if not hasattr(ops, name):
        raise CannotRun(f"this version of tcompress has no {name}")
    return getattr(ops, name)


def _prepack(weight: torch.Tensor, layout: str) -> torch.Tensor:
    try:
        return _op("sparse_prepack")(weight, layout)
    except ValueError as error:  # the layout is newer than this version
        raise CannotRun(str(error)) from error


def ours_float(layout: str) -> Callable[..., Call]:
    """float32 weights in the kernel layout "unstructured" or "8x4"."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
        need_blocks(w, layout)
        linear, packed = _op("sparse_linear"), _prepack(w, layout)
        return lambda: linear(x, packed, len(w), b, layout)

    return factory


def ours_int8(layout: str) -> Callable[..., Call]:
    """int8 weights, a scale a channel, in the kernel layout "1x4", "8x4" or "2:4"; activations as the scheme "int8"
    has them on this machine."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
        from tcompress.quantize.scheme import Scheme

        need_blocks(w, layout)
        scheme = Scheme.named("int8")
        activations = scheme.activations
        assert activations is not None
        largest = 2 ** (scheme.weights.bits - 1) - 1
        scale = w.abs().amax(1).clamp(min=1e-10) / largest
        linear, packed = _op("int8_sparse_linear"), _prepack((w / scale[:, None]).round().to(torch.int8), layout)
        options: dict[str, Any] = {"act_bits": activations.bits, "act_symmetric": activations.symmetric}
        return lambda: linear(x, packed, scale, b, layout, **options)

    return factory


def ours_int4(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    """int4 weights in blocks of 8x4, a float16 scale for each 128 inputs; 8-bit activations."""
    need_blocks(w, "8x4")
    prepack, linear = _op("int4_sparse_prepack"), _op("int4_sparse_linear")
    q, scale = quantize_groups(w, INT4_GROUP)
    packed = prepack(q.flatten(1), scale[..., 0].half(), INT4_GROUP)
    options: dict[str, Any] = {"group_size": INT4_GROUP, "scale_dtype": torch.float16, "act_bits": 8}
    return lambda: linear(x, packed, len(w), b, **options)
