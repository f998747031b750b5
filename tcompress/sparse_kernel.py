"""The ways to multiply by a weight with zeros on its device, the dense way included."""

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
from tcompress.ops.sparse_prepack import (
    LAYOUTS,
    float_type,
    gpu_layouts,
    is_fixed,
    sparse_prepack,
)
from tcompress.ops.sparse_two_four import TWO_FOUR, is_two_four
from tcompress.ops.sparse_unpack import sparse_unpack
from tcompress.packing import find_patterns
from tcompress.quantize.scheme import Scheme

DENSE = "dense"


@dataclass(frozen=True)
class SparseKernel:
    """One kernel layout and the op that reads it.

    Attributes:
        layout: "dense", or one of `ops.sparse_prepack.layouts_of`.
        scheme: of an int8 weight; None for floats.
    """

    layout: str
    scheme: Scheme | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the weight in a sparse layout."""
        return float_type(self.layout) if self.scheme is None else torch.int8

    def prepack(self, weight: torch.Tensor) -> torch.Tensor:
        """[N, K] float (the CPU's sparse layouts hold float32) or int8 to what `__call__` takes."""
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

    def runs_on(self, packed: torch.Tensor, n: int, k: int) -> str:
        """The backend that multiplies; "torch" where that is torch's own dense product."""
        x = torch.empty((1, k), dtype=torch.float32, device=packed.device)
        scale = torch.empty(n, dtype=torch.float32, device=packed.device)
        if self.layout != DENSE:
            found = _kernel_of_layout(x, packed, scale, self.layout, self.scheme)
        elif self.scheme is not None:
            plain, kernel = (packed, None) if packed.dim() == 2 else (None, packed)
            found = backend.kernel_for("int8_linear", x, plain, scale, None, kernel)
        else:
            found = "torch"
        return found or "reference"


def kernels_for(weight: torch.Tensor, scheme: Scheme | None) -> tuple[SparseKernel, ...]:
    """The ways to run a weight on its device, the dense one first; that one alone where no kernel of it can run."""
    if _has_cpu_kernels(weight):
        layouts = [*LAYOUTS[torch.float32 if scheme is None else torch.int8]]
        if scheme is not None:
            layouts.append(TWO_FOUR)
    else:
        layouts = [layout for layout in gpu_layouts(weight.dtype) if _has_gpu_kernel(weight, layout, scheme)]
    if any(map(is_fixed, layouts)) and not is_two_four(weight):
        layouts = [layout for layout in layouts if not is_fixed(layout)]
    return tuple(SparseKernel(layout, scheme) for layout in (DENSE, *layouts))


def best_pattern(weight: torch.Tensor) -> str:
    """The pattern found in a weight's zeros in which it is smallest; 2:4 where that is no larger than another."""
    bits = weight.element_size() * 8
    return min(find_patterns(weight), key=lambda fit: (fit.nbytes(bits), ":" not in fit.pattern)).pattern


def _has_cpu_kernels(weight: torch.Tensor) -> bool:
    if weight.device.type != "cpu" or _extension.C is None:
        return False
    return backend.kernel_for("sparse_unpack", weight, *weight.shape, torch.float32, "8x4") == "cpu"


def _has_gpu_kernel(weight: torch.Tensor, layout: str, scheme: Scheme | None) -> bool:
    return _kernel_of_layout(weight, weight, weight, layout, scheme) is not None


def _kernel_of_layout(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, layout: str, scheme: Scheme | None
) -> str | None:
    """The backend that multiplies by a weight in a sparse layout, or None."""
    if scheme is None:
        return backend.kernel_for("sparse_linear", x, packed, 0, None, layout)
    return backend.kernel_for("int8_sparse_linear", x, packed, scale, None, layout)
