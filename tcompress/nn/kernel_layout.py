"""Between a weight's storage layout and the layout that its compiled kernel reads. A module keeps one of the two."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch

from tcompress import _extension, backend
from tcompress.ops.int4_prepack import int4_prepack
from tcompress.ops.int4_unpack import int4_unpack
from tcompress.ops.int8_prepack import int8_prepack
from tcompress.ops.int8_unpack import int8_unpack
from tcompress.packing import PackedWeight

GPU_BACKENDS = ("triton", "cuda")


@dataclass(frozen=True)
class KernelWeight:
    """A weight in the layout of its compiled kernel, from which the storage layout can be had again.

    Attributes:
        data: one-dimensional; the result of `int8_prepack` or `int4_prepack`. None in a description.
        scale: layout "dense": float32 [N]. Layout "int4": None, for the scales are part of `data`.
        shape, layout, group_size: as in `PackedWeight`.
        scale_dtype, has_zero_point: of the `PackedWeight`.
    """

    data: torch.Tensor | None
    scale: torch.Tensor | None
    shape: tuple[int, int]
    layout: str
    group_size: int
    scale_dtype: torch.dtype
    has_zero_point: bool

    def without_tensors(self) -> KernelWeight:
        """The description alone."""
        return replace(self, data=None, scale=None)

    def with_tensors(self, data: torch.Tensor, scale: torch.Tensor | None) -> KernelWeight:
        """The description with its tensors."""
        return replace(self, data=data, scale=scale)

    def unpack(self) -> PackedWeight:
        """The weight in its storage layout: new tensors. On any backend: one that is forced for products may not have
        this."""
        n, k = self.shape
        assert self.data is not None
        gpu_forced = backend.forced() in GPU_BACKENDS
        with backend.use_backend(None) if gpu_forced else nullcontext():
            if self.scale is not None:
                return PackedWeight(int8_unpack(self.data, n, k), self.scale, self.shape)
            parts = int4_unpack(self.data, n, k, self.group_size, self.scale_dtype, self.has_zero_point)
        zero_point = parts[2] if self.has_zero_point else None
        return PackedWeight(parts[0], parts[1], self.shape, "int4", zero_point, self.group_size)


def kernel_weight(packed: PackedWeight, weight_only: bool = False) -> KernelWeight | None:
    """The layout for the compiled kernels, or None where what runs reads the storage layout: Triton and the references
    do, and of CUDA C++ all but W4A16.

    Args:
        packed: the weight.
        weight_only: whether activations stay in floats.
    """
    if packed.qdata.device.type == "cpu":
        if _extension.C is None or backend.forced() in GPU_BACKENDS:
            return None
    elif not (packed.layout == "int4" and weight_only and _cuda_runs(packed)):
        return None
    (n, k), zero_point = packed.shape, packed.zero_point
    if packed.layout == "dense":
        data, scale = int8_prepack(packed.qdata), packed.scale
    else:
        data, scale = int4_prepack(packed.qdata, packed.scale, zero_point, k, packed.group_size), None
    return KernelWeight(
        data, scale, (n, k), packed.layout, packed.group_size, packed.scale.dtype, zero_point is not None
    )


def _cuda_runs(packed: PackedWeight) -> bool:
    """Whether the CUDA C++ kernel would be chosen for one token in 16 bits."""
    if packed.qdata.device.type != "cuda" or backend.forced() not in (None, "cuda"):
        return False
    x = packed.qdata.new_empty((1, packed.shape[1]), dtype=torch.bfloat16)
    weight = (packed.qdata, packed.scale, packed.zero_point)
    arguments = (x, *weight, None, None, packed.group_size, None, True, "none", None)
    return backend.select("int4_linear", *arguments) == "cuda"
