"""A compressed weight in its portable storage layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tcompress.packing.int4 import unpack_int4


@dataclass(frozen=True)
class PackedWeight:
    """Integers and scales of one weight, in the layout that is saved; kernels derive their own layout from it.

    Attributes:
        qdata: the stored integers. Layout "dense": int8 [N, K]. Layout "int4": uint8 [N, ceil(K/2)], two 4-bit
            integers a byte, 0 … 15 (`pack_int4`).
        scale: "dense": float32 [N]. "int4": float16 or float32 [N, ceil(K/g)].
        shape: (N, K) of the weight.
        layout: "dense": `W[n,k] ≈ qdata[n,k] · scale[n]`. "int4": `W[n,k] ≈ (q[n,k] - zero_point[n,i]) · scale[n,i]`
            with i = k/g.
        zero_point: "int4": uint8, the shape of scale, or None where it is 8 everywhere.
        group_size: "int4": g, how many weights along K share a scale; K or more for one scale a channel.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    layout: str = "dense"
    zero_point: torch.Tensor | None = None
    group_size: int = 0

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the integers stand for, [N, K]."""
        if self.layout == "dense":
            return (self.qdata.float() * self.scale[:, None]).to(dtype)
        k = self.shape[1]
        q = unpack_int4(self.qdata, k).float()
        return ((q - self._along_k(self.zero_point)) * self._along_k(self.scale)).to(dtype)

    def _along_k(self, per_group: torch.Tensor | None) -> torch.Tensor | float:
        if per_group is None:
            return 8.0
        k = self.shape[1]
        size = min(self.group_size, max(k, 1))
        return per_group.float().repeat_interleave(size, 1)[:, :k]

    @property
    def nbytes(self) -> int:
        return self.qdata.nbytes + self.scale.nbytes + (0 if self.zero_point is None else self.zero_point.nbytes)
