"""A compressed weight in its portable storage layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PackedWeight:
    """Integers and scales of one weight, in the layout that is saved; kernels derive their own layout from it.

    Attributes:
        qdata: the stored integers. Layout "dense": int8 [N, K].
        scale: float32 [N]; `W[n, k] ≈ qdata[n, k] * scale[n]`.
        shape: (N, K) of the weight.
        layout: name of the storage layout; "dense" is the only one so far.
    """

    qdata: torch.Tensor
    scale: torch.Tensor
    shape: tuple[int, int]
    layout: str = "dense"

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight that the integers stand for, [N, K]."""
        return (self.qdata.float() * self.scale[:, None]).to(dtype)

    @property
    def nbytes(self) -> int:
        return self.qdata.nbytes + self.scale.nbytes
