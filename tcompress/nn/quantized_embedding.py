"""Drop-in for `torch.nn.Embedding` with int8 rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.errors import message
from tcompress.packing import PackedWeight
from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import Scheme


class QuantizedEmbedding(nn.Module):
    """Looks up int8 rows and multiplies each by its scale: `y = weight_packed[id] * weight_scale[id]`.

    The state dict holds `weight_packed` (int8 [num_embeddings, embedding_dim]) and `weight_scale` (float32
    [num_embeddings]).

    Args:
        num_embeddings, embedding_dim, padding_idx: as in `torch.nn.Embedding`.
        scheme: a weight-only scheme, W8A16.
        dtype: type of the result.

    Raises:
        ValueError: a scheme with quantized activations; an embedding has none.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        scheme: str | Scheme = "W8A16",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        if scheme.activations is not None:
            hint = "an embedding has no activations to quantize; use W8A16"
            raise ValueError(message("QuantizedEmbedding", "scheme", scheme.name, "a weight-only scheme", hint))
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scheme = scheme
        self.dtype = dtype or torch.get_default_dtype()
        shape = (num_embeddings, embedding_dim)
        self.register_buffer("weight_packed", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(num_embeddings, dtype=torch.float32, device=device))

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype, padding_idx: int | None = None
    ) -> QuantizedEmbedding:
        """A module around an already quantized table, which it shares."""
        module = cls(*packed.shape, padding_idx, scheme, device="meta", dtype=dtype)
        module.weight_packed, module.weight_scale = packed.qdata, packed.scale
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

    @property
    def packed(self) -> PackedWeight:
        """The table in its storage layout; shares memory with the module."""
        return PackedWeight(self.weight_packed, self.weight_scale, (self.num_embeddings, self.embedding_dim))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [...] integers. Returns [..., embedding_dim]."""
        rows = F.embedding(input, self.weight_packed).float()
        return (rows * F.embedding(input, self.weight_scale[:, None])).to(self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, scheme={self.scheme.name}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedEmbedding:
        # .half() and .bfloat16() change the result's type, not the scales.
        scale = self.weight_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self
