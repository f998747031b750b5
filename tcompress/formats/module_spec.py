"""How a checkpoint describes a compressed module."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from torch import nn

from tcompress.errors import message
from tcompress.match import COMPRESSED
from tcompress.nn import (
    CodebookLinear,
    Int8Attention,
    Int8MultiheadAttention,
    LowRankLinear,
    OutlierLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    SparseLinear,
)
from tcompress.packing import SparseWeight
from tcompress.quantize.scheme import Scheme
from tcompress.weights import is_conv1d, linear_weight

#: The float types by the names that a checkpoint uses.
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.bfloat16, torch.float16, torch.float64)}


def _known(value: str) -> str:
    if value not in DTYPES:
        raise ValueError(message("load", "dtype", repr(value), f"one of {sorted(DTYPES)}"))
    return value


DtypeName = Annotated[str, AfterValidator(_known)]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    scheme: Scheme
    dtype: DtypeName


class LinearSpec(_Spec):
    """A `QuantizedLinear`."""

    kind: Literal["QuantizedLinear"] = "QuantizedLinear"
    in_features: int
    out_features: int
    bias: bool
    activation: str = "none"


class OutlierSpec(_Spec):
    """An `OutlierLinear`, whose quantized part is described by itself."""

    kind: Literal["OutlierLinear"] = "OutlierLinear"
    in_features: int
    out_features: int
    outliers: int
    bias: bool


class EmbeddingSpec(_Spec):
    """A `QuantizedEmbedding`."""

    kind: Literal["QuantizedEmbedding"] = "QuantizedEmbedding"
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None


class SparseSpec(BaseModel):
    """A `SparseLinear`. `values` and `index` are the lengths of what it stores; `dtype` is that of the values, and
    `bias` that of the bias, if there is one. `layout` is the kernel's, on the machine that wrote it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["SparseLinear"] = "SparseLinear"
    in_features: int
    out_features: int
    scheme: Scheme | None
    dtype: Literal["int8", "float32", "bfloat16", "float16"]
    bias: DtypeName | None
    pattern: str
    index_kind: Literal["bitmap", "delta", "positions"]
    values: int = Field(ge=0)
    index: int = Field(ge=0)
    layout: str
    activation: str = "none"


class CodebookSpec(BaseModel):
    """A `CodebookLinear`. `codebook` is the type of the stored values, `dtype` that of the weight looked up."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["CodebookLinear"] = "CodebookLinear"
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    bits: int = Field(ge=1, le=8)
    rows: int = Field(ge=1)
    columns: int = Field(ge=1)
    held: Literal["float", "indices"]
    codebook: Literal["float16", "float32"]
    dtype: DtypeName
    bias: bool


class LowRankSpec(BaseModel):
    """A `LowRankLinear` with float factors of type `dtype`; what else stands in it is described by itself."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    kind: Literal["LowRankLinear"] = "LowRankLinear"
    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    rank: int = Field(ge=1)
    bias: bool
    dtype: DtypeName


class _AttentionSpec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class AttentionSpec(_AttentionSpec):
    """An `Int8Attention`, which holds no tensors."""

    kind: Literal["Int8Attention"] = "Int8Attention"
    bits: Literal["auto", 8, 12]
    precision: Literal["int8", "float"]


class MultiheadAttentionSpec(_AttentionSpec):
    """An `Int8MultiheadAttention` with float projections of type `dtype`; what else it holds is described by itself."""

    kind: Literal["Int8MultiheadAttention"] = "Int8MultiheadAttention"
    embed_dim: int
    num_heads: int
    kdim: int
    vdim: int
    bias: bool
    batch_first: bool
    dropout: float
    dtype: DtypeName


Spec: TypeAlias = (
    LinearSpec
    | OutlierSpec
    | SparseSpec
    | EmbeddingSpec
    | CodebookSpec
    | LowRankSpec
    | AttentionSpec
    | MultiheadAttentionSpec
)
#: The classes that a checkpoint describes.
DESCRIBED = (*COMPRESSED, LowRankLinear, Int8Attention, Int8MultiheadAttention)


def describe(module: nn.Module) -> Spec:
    """The description of a compressed module, from which `build` makes an empty one like it."""
    if isinstance(module, Int8Attention):
        return AttentionSpec(bits=module.bits, precision=module.precision)
    if isinstance(module, Int8MultiheadAttention):
        kinds = nn.Linear | QuantizedLinear | SparseLinear
        projections = [child for child in module.children() if isinstance(child, kinds)]
        floats = [child.weight.dtype for child in projections if isinstance(child, nn.Linear)]
        return MultiheadAttentionSpec(
            embed_dim=module.embed_dim,
            num_heads=module.num_heads,
            kdim=module.kdim,
            vdim=module.vdim,
            bias=projections[0].bias is not None,
            batch_first=module.batch_first,
            dropout=module.dropout,
            dtype=_name(floats[0] if floats else torch.float32),
        )
    if isinstance(module, QuantizedLinear):
        return LinearSpec(
            scheme=module.scheme,
            dtype=_name(torch.float32 if module.bias is None else module.bias.dtype),
            in_features=module.in_features,
            out_features=module.out_features,
            bias=module.bias is not None,
            activation=module.activation,
        )
    if isinstance(module, OutlierLinear):
        return OutlierSpec(
            scheme=module.scheme,
            dtype=_name(module.outlier_weight.dtype),
            in_features=module.in_features,
            out_features=module.out_features,
            outliers=module.outlier_columns.numel(),
            bias=module.bias is not None,
        )
    if isinstance(module, SparseLinear):
        packed = module.packed
        return SparseSpec(
            in_features=module.in_features,
            out_features=module.out_features,
            scheme=module.scheme,
            dtype=_name(packed.values.dtype),  # type: ignore[arg-type]
            bias=None if module.bias is None else _name(module.bias.dtype),
            pattern=packed.pattern,
            index_kind=packed.index_kind,  # type: ignore[arg-type]
            values=packed.values.numel(),
            index=packed.index.numel(),
            layout=module.layout,
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
    if isinstance(module, CodebookLinear):
        return CodebookSpec(
            in_features=module.in_features,
            out_features=module.out_features,
            bits=module.bits,
            rows=module.rows,
            columns=module.columns,
            held=module.held,  # type: ignore[arg-type]
            codebook=_name(module.weight_codebook.dtype),  # type: ignore[arg-type]
            dtype=_name(module.dtype),
            bias=module.bias is not None,
        )
    if isinstance(module, LowRankLinear):
        floats = [child.weight.dtype for child in module.children() if isinstance(child, nn.Linear)]
        return LowRankSpec(
            in_features=module.in_features,
            out_features=module.out_features,
            rank=module.rank,
            bias=module.bias is not None,
            dtype=_name(floats[0] if floats else torch.float32),
        )
    raise TypeError(message("save", "module", type(module).__name__, "a compressed module"))


def build(spec: Spec) -> nn.Module:
    """A module without values (on the meta device), to be loaded by assignment."""
    if isinstance(spec, AttentionSpec):
        return Int8Attention(spec.bits, spec.precision)
    if isinstance(spec, MultiheadAttentionSpec):
        return Int8MultiheadAttention(
            spec.embed_dim,
            spec.num_heads,
            dropout=spec.dropout,
            bias=spec.bias,
            kdim=spec.kdim,
            vdim=spec.vdim,
            batch_first=spec.batch_first,
            device="meta",
            dtype=DTYPES[spec.dtype],
        )
    if isinstance(spec, SparseSpec):
        return _build_sparse(spec)
    dtype = DTYPES[spec.dtype]
    if isinstance(spec, CodebookSpec):
        size = (spec.in_features, spec.out_features, spec.bias, spec.bits, spec.rows, spec.columns, spec.held)
        return CodebookLinear(*size, getattr(torch, spec.codebook), "meta", dtype)
    if isinstance(spec, LowRankSpec):
        return LowRankLinear(spec.in_features, spec.out_features, spec.rank, spec.bias, "meta", dtype)
    if isinstance(spec, LinearSpec):
        shape = (spec.in_features, spec.out_features, spec.bias, spec.scheme)
        return QuantizedLinear(*shape, device="meta", dtype=dtype, activation=spec.activation)
    if isinstance(spec, OutlierSpec):
        sizes = (spec.in_features, spec.out_features, spec.outliers, spec.bias, spec.scheme)
        return OutlierLinear(*sizes, device="meta", dtype=dtype)
    table = (spec.num_embeddings, spec.embedding_dim, spec.padding_idx, spec.scheme)
    return QuantizedEmbedding(*table, device="meta", dtype=dtype)


def _build_sparse(spec: SparseSpec) -> SparseLinear:
    shape, bits = (spec.out_features, spec.in_features), {"int8": 8, "float32": 32}.get(spec.dtype, 16)
    values = torch.empty(spec.values, dtype=getattr(torch, spec.dtype), device="meta")
    index = torch.empty(spec.index, dtype=torch.uint8, device="meta")
    scale = None if spec.scheme is None else torch.empty(spec.out_features, device="meta")
    bias = None if spec.bias is None else torch.empty(spec.out_features, dtype=DTYPES[spec.bias], device="meta")
    try:
        packed = SparseWeight(values, index, spec.index_kind, shape, spec.pattern, bits, scale)
        return SparseLinear(packed, bias, spec.scheme, spec.layout, spec.activation)
    except (ValueError, TypeError) as error:
        raise ValueError(message("load", "SparseLinear", f"a wrong description ({error})", "a checkpoint")) from error


def mismatch(module: nn.Module, spec: Spec) -> tuple[str, str] | None:
    """What a model has at a place and what the checkpoint has there, or None if they agree."""
    got = type(module).__name__
    if isinstance(module, nn.Linear | QuantizedLinear | SparseLinear | OutlierLinear | CodebookLinear | LowRankLinear):
        got = _linear(module.out_features, module.in_features, module.bias is not None)
    elif is_conv1d(module):
        n, k = linear_weight(module).shape
        got = _linear(n, k, True)
    elif isinstance(module, nn.Embedding | QuantizedEmbedding):
        got = _embedding(module.num_embeddings, module.embedding_dim)
    elif isinstance(module, Int8Attention):
        got = _ATTENTION
    elif isinstance(module, nn.MultiheadAttention | Int8MultiheadAttention):
        got = _multihead(module.embed_dim, module.num_heads, module.kdim, module.vdim)
    if isinstance(spec, AttentionSpec):
        expected = _ATTENTION
    elif isinstance(spec, MultiheadAttentionSpec):
        expected = _multihead(spec.embed_dim, spec.num_heads, spec.kdim, spec.vdim)
    elif isinstance(spec, LinearSpec | OutlierSpec | CodebookSpec | LowRankSpec):
        expected = _linear(spec.out_features, spec.in_features, spec.bias)
    elif isinstance(spec, SparseSpec):
        expected = _linear(spec.out_features, spec.in_features, spec.bias is not None)
    else:
        expected = _embedding(spec.num_embeddings, spec.embedding_dim)
    return None if got == expected else (got, expected)


def _linear(n: int, k: int, bias: bool) -> str:
    return f"a linear layer [{n}, {k}] {'with' if bias else 'without'} bias"


def _embedding(n: int, k: int) -> str:
    return f"an embedding [{n}, {k}]"


_ATTENTION = "an Int8Attention"


def _multihead(size: int, heads: int, kdim: int, vdim: int) -> str:
    return f"multi-head attention of {heads} heads over {size}, {kdim} and {vdim} channels"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
