"""The ways to multiply by a weight with zeros on this machine, the dense way included."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tcompress import _extension, backend
from tcompress.ops.int8_linear import activate, int8_linear
from tcompress.ops.int8_prepack import int8_prepack
from tcompress.ops.int8_sparse_linear import int8_sparse_linear
from tcompress.ops.int8_unpack import int8_unpack
from tcompress.ops.sparse_linear import sparse_linear
from tcompress.ops.sparse_prepack import LAYOUTS, sparse_prepack
from tcompress.ops.sparse_two_four import TWO_FOUR, is_two_four
from tcompress.ops.sparse_unpack import sparse_unpack
from tcompress.packing import find_patterns
from tcompress.quantize.scheme import Scheme

DENSE = "dense"


@dataclass(frozen=True)
class SparseKernel:
    """One kernel layout and the op that reads it.

    Attributes:
        layout: "dense", or one of `ops.sparse_prepack.LAYOUTS`.
        scheme: of an int8 weight; None for floats.
    """

    layout: str
    scheme: Scheme | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight in a sparse layout."""
        return torch.float32 if self.scheme is None else torch.int8

    def prepack(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] float (the sparse layouts hold float32) or int8 to what `__call__` takes."""
        if self.layout != DENSE:
            return sparse_prepack(weight.to(self.dtype), self.layout)
        return weight if self.scheme is None or not _has_cpu_kernels(weight) else int8_prepack(weight)

    def unpack(self, packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """The inverse of `prepack`."""
        if self.layout != DENSE:
            return sparse_unpack(packed, n, k, self.dtype, self.layout)
        return packed if packed.dim() == 2 else int8_unpack(packed, n, k)

    def __call__(
        self,
        x: torch.Tensor,
        packed: torch.Tensor,
        n: int,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        activation: str,
        residual: torch.Tensor | None,
    ) -> torch.Tensor:
        """`activation(x Wᵀ + bias) + residual`."""
        if self.scheme is None:
            if self.layout != DENSE:
                return sparse_linear(x, packed, n, bias, self.layout, activation, residual=residual)
            y = activate(F.linear(x, packed.to(x.dtype), None if bias is None else bias.to(x.dtype)), activation)
            return y if residual is None else y + residual
        assert scale is not None
        assert self.scheme.activations is not None
        bits, symmetric = self.scheme.activations.bits, self.scheme.activations.symmetric
        if self.layout != DENSE:
            return int8_sparse_linear(
                x, packed, scale, bias, self.layout, bits, symmetric, activation, residual=residual
            )
        plain, kernel = (packed, None) if packed.dim() == 2 else (None, packed)
        return int8_linear(x, plain, scale, bias, kernel, bits, symmetric, activation, residual=residual)


def kernels_for(weight: torch.Tensor, scheme: Scheme | None) -> tuple[SparseKernel, ...]:
    """The ways to run a weight, the dense one first; that one alone where no CPU kernel can run."""
    if not _has_cpu_kernels(weight):
        return (SparseKernel(DENSE, scheme),)
    layouts = [DENSE, *LAYOUTS[torch.float32 if scheme is None else torch.int8]]
    if weight.dtype == torch.int8 and is_two_four(weight):
        layouts.append(TWO_FOUR)
    return tuple(SparseKernel(layout, scheme) for layout in layouts)


def best_pattern(weight: torch.Tensor) -> str:
    """The pattern found in a weight's zeros in which it is smallest; 2:4 where that is no larger than another."""
    bits = weight.element_size() * 8
    return min(find_patterns(weight), key=lambda fit: (fit.nbytes(bits), ":" not in fit.pattern)).pattern


def _has_cpu_kernels(weight: torch.Tensor) -> bool:
    return weight.device.type == "cpu" and _extension.C is not None and backend.select("sparse_unpack", weight) == "cpu"
