"""The step that leaves out zeros."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from tcompress.quantize.scheme import Scheme
from tcompress.recipe.step import Step


class Sparse(Step):
    """Replaces linear layers whose weights hold zeros, from whatever pruned them, by `tcompress.nn.SparseLinear`.

    Attributes:
        scheme: of int8 values ("int8", "W8A8", "W7A7" …), or None for the floats as they are.
        tokens: how many tokens a call usually has: the layout of the kernel, the dense one among the candidates, is
            chosen by measuring that many on this machine (`tcompress.tune`).
        min_sparsity: a layer with a smaller part of zeros is left to the later steps.
        targets, ignore: as in `Step`.
    """

    step: Literal["sparse"] = "sparse"
    scheme: Scheme | None = None
    tokens: int = Field(128, ge=1)
    min_sparsity: float = Field(0.1, ge=0, le=1)

    @field_validator("scheme", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return Scheme.named(value) if isinstance(value, str) else value

    @field_validator("scheme")
    @classmethod
    def _eight_bits(cls, value: Scheme | None) -> Scheme | None:
        if value is not None and (value.weights.bits <= 4 or value.activations is None):
            raise ValueError(f"got {value.name}, expected 5 to 8 bits for weights and quantized activations, or none")
        if value is not None and value.static:
            raise ValueError(f"got {value.name}, expected dynamic activations: sparse kernels quantize each token")
        return value
