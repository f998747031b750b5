"""Between a weight's storage layout and the layout that its CPU kernel reads. A module keeps one of the two."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from tcompress import _extension, backend
from tcompress.ops.int4_prepack import int4_prepack
from tcompress.ops.int4_unpack import int4_unpack
from tcompress.ops.int8_prepack import int8_prepack
from tcompress.ops.int8_unpack import int8_unpack
from tcompress.packing import PackedWeight


@dataclass(frozen=True)
class KernelWeight:
    """A weight in the layout of its CPU kernel, from which the storage layout can be had again.

    Attributes:
        data: int8, one-dimensional; the result of `int8_prepack` or `int4_prepack`. None in a description.
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
        """The weight in its storage layout: new tensors."""
        n, k = self.shape
        assert self.data is not None
        if self.scale is not None:
            return PackedWeight(int8_unpack(self.data, n, k), self.scale, self.shape)
        parts = int4_unpack(self.data, n, k, self.group_size, self.scale_dtype, self.has_zero_point)
        zero_point = parts[2] if self.has_zero_point else None
        return PackedWeight(parts[0], parts[1], self.shape, "int4", zero_point, self.group_size)


def kernel_weight(packed: PackedWeight) -> KernelWeight | None:
    """The layout for the CPU kernels, or None where they do not run: another device, no extension, or a GPU backend is
    forced. The Triton kernels read the storage layout."""
    if packed.qdata.device.type != "cpu" or _extension.C is None or backend.forced() in ("triton", "cuda"):
        return None
    (n, k), zero_point = packed.shape, packed.zero_point
    if packed.layout == "dense":
        data, scale = int8_prepack(packed.qdata), packed.scale
    else:
        data, scale = int4_prepack(packed.qdata, packed.scale, zero_point, k, packed.group_size), None
    return KernelWeight(
        data, scale, (n, k), packed.layout, packed.group_size, packed.scale.dtype, zero_point is not None
    )
