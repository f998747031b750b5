"""How a checkpoint describes a compressed module."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, field_validator
from torch import nn

from tcompress.errors import message
from tcompress.nn import QuantizedEmbedding, QuantizedLinear
from tcompress.quantize.scheme import Scheme

_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    scheme: Scheme
    dtype: str

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in _DTYPES:
            raise ValueError(message("load", "dtype", repr(value), f"one of {sorted(_DTYPES)}"))
        return value


class LinearSpec(_Spec):
    """A `QuantizedLinear`."""

    kind: Literal["QuantizedLinear"] = "QuantizedLinear"
    in_features: int
    out_features: int
    bias: bool
    activation: str = "none"


class EmbeddingSpec(_Spec):
    """A `QuantizedEmbedding`."""

    kind: Literal["QuantizedEmbedding"] = "QuantizedEmbedding"
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None


def describe(module: nn.Module) -> LinearSpec | EmbeddingSpec:
    """The description of a compressed module, from which `build` makes an empty one like it."""
    if isinstance(module, QuantizedLinear):
        return LinearSpec(
            scheme=module.scheme,
            dtype=_name(torch.float32 if module.bias is None else module.bias.dtype),
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
            activation=module.activation,
        )
    if isinstance(module, QuantizedEmbedding):
        return EmbeddingSpec(
            scheme=module.scheme,
            dtype=_name(module.dtype),
            num_embeddings=module.num_embeddings,
            embedding_dim=module.embedding_dim,
            padding_idx=module.padding_idx,
        )
    raise TypeError(message("save", "module", type(module).__name__, "a compressed module"))


def build(spec: LinearSpec | EmbeddingSpec) -> nn.Module:
    """A module without values (on the meta device), to be loaded by assignment."""
    dtype = _DTYPES[spec.dtype]
    if isinstance(spec, LinearSpec):
        shape = (spec.in_features, spec.out_features, spec.bias, spec.scheme)
        return QuantizedLinear(*shape, device="meta", dtype=dtype, activation=spec.activation)
    table = (spec.num_embeddings, spec.embedding_dim, spec.padding_idx, spec.scheme)
    return QuantizedEmbedding(*table, device="meta", dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
