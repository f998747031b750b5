"""Drop-in for `torch.nn.Embedding` with int8 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.errors import message
from tcompress.nn.packed_module import PackedModule
from tcompress.ops.int8_unpack import int8_unpack
from tcompress.packing import PackedWeight
from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import Scheme


class QuantizedEmbedding(PackedModule):
    """Looks up int8 or int4 rows and multiplies them by their scales: `y = weight_packed[id] * weight_scale[id]`.

    The state dict holds `weight_packed` (int8 [num_embeddings, embedding_dim], or two 4-bit integers a byte),
    `weight_scale` ([num_embeddings], or [num_embeddings, groups]) and, if the scheme has them, `weight_zero_point`.

    A table that is an int8 output layer's weight too (tied) is held once, in the layout of that layer's kernel.

    Args:
        num_embeddings, embedding_dim, padding_idx: as in `torch.nn.Embedding`.
        scheme: a weight-only scheme: W8A16, W4A16-g32 …
        dtype: type of the result.

    Raises:
        ValueError: a scheme with quantized activations; an embedding has none.
    """

    _wants_kernel_layout = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scheme: str | Scheme = "W8A16",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        if scheme.activations is not None:
            hint = "an embedding has no activations to quantize; use W8A16"
            raise ValueError(message("QuantizedEmbedding", "scheme", scheme.name, "a weight-only scheme", hint))
        super().__init__((num_embeddings, embedding_dim), scheme, device)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype, padding_idx: int | None = None
    ) -> QuantizedEmbedding:
        """A module around an already quantized table, which it shares."""
        module = cls(*packed.shape, padding_idx, scheme, device="meta", dtype=dtype)
        module._hold(packed)
        return module

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, scheme: str | Scheme = "W8A16") -> QuantizedEmbedding:
        """Quantizes each row of an embedding by rounding to nearest.

        Raises:
            ValueError: the table holds NaN or infinity, or `max_norm` is set (it changes the table at every call).
        """
        if embedding.max_norm is not None:
            raise ValueError(message("QuantizedEmbedding", "max_norm", embedding.max_norm, "None"))
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        packed = round_to_nearest(embedding.weight, scheme.weights)
        module = cls.from_packed(packed, scheme, embedding.weight.dtype, embedding.padding_idx)
        return module.train(embedding.training)

    @property
    def weight(self) -> torch.Tensor:
        """The whole table in floating point, computed at each access; some models add it without a look-up."""
        return self.packed.dequantize(self.dtype)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [...] integers. Returns [..., embedding_dim]."""
        n, k = self.num_embeddings, self.embedding_dim
        if self.kernel_weight is not None and self.scale is not None:
            rows = int8_unpack(self.kernel_weight, n, k, input.reshape(-1).long()).view(*input.shape, k)
            return (rows.float() * F.embedding(input, self.scale[:, None])).to(self.dtype)
        packed = self.packed
        if packed.layout == "dense":
            rows = F.embedding(input, packed.qdata)
            return (rows.float() * F.embedding(input, packed.scale[:, None])).to(self.dtype)
        ids = input.reshape(-1)
        zero_point = None if packed.zero_point is None else F.embedding(ids, packed.zero_point)
        parts = F.embedding(ids, packed.qdata), F.embedding(ids, packed.scale)
        looked_up = PackedWeight(*parts, (ids.numel(), k), packed.layout, zero_point, packed.group_size)
        return looked_up.dequantize(self.dtype).view(*input.shape, k)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedEmbedding:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype  # .half() and .bfloat16() change the result's type
        return self
