"""The step that sets weights to zero."""

from __future__ import annotations

import math
import reprlib
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationInfo, field_validator

from tcompress.packing import Pattern
from tcompress.recipe.step import Step


class Prune(Step):
    """Sets the smallest weights of linear layers to zero (`tcompress.prune`); later steps compress what is left.

    Attributes:
        pattern: "unstructured", "2:4", "1x4", "8x4", "16x16" …, outputs x inputs (`packing.Pattern`).
        sparsity: which part of the weights goes, 0 … 1; of "N:M" it is 1 - N/M and may be left out.
        algorithm: which go (`tcompress.prune`): "magnitude", the smallest; "wanda", those with the smallest products
            with their inputs; "sparsegpt", those that are easiest to make up for by the weights that stay; with "gptq"
            in another step both are done in one pass over the data. The latter two need data.
        scope: whether each "layer" loses its part, or those go that are smallest in all layers of the step together
            ("model"); by magnitude alone. For the other algorithms `tcompress.global_ratios` ranks the layers.
        targets, ignore: as in `Step`.
    """

    step: Literal["prune"] = "prune"
    pattern: str = "8x4"
    sparsity: float | None = Field(None, ge=0, le=1, validate_default=True)
    algorithm: Literal["magnitude", "wanda", "sparsegpt"] = Field(
        "magnitude", validation_alias=AliasChoices("algorithm", "scores")
    )  # "scores" is what it was called
    scope: Literal["layer", "model"] = "layer"

    @property
    def needs_data(self) -> bool:
        """Whether it decides by the inputs of layers."""
        return self.algorithm != "magnitude"

    @field_validator("pattern", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> str:
        if not isinstance(value, str):
            hint = '; write "2:4" in quotes: without them it is a number to YAML' if isinstance(value, int) else ""
            raise ValueError(f"got {reprlib.repr(value)}, expected text such as '8x4'{hint}")
        return str(Pattern.parse(value))

    @field_validator("sparsity")
    @classmethod
    def _how_much(cls, value: float | None, info: ValidationInfo) -> float | None:
        if "pattern" not in info.data:  # which has an error of its own
            return value
        pattern = Pattern.parse(info.data["pattern"])
        n, m = pattern.size
        if pattern.kind == "n_m":
            if value is not None and not math.isclose(value, 1 - n / m):
                raise ValueError(f"got {value}, expected {1 - n / m} or nothing for {pattern}")
        elif value is None:
            raise ValueError(f"got nothing, expected 0 to 1 for {pattern}")
        return value

    @field_validator("scope")
    @classmethod
    def _rankable(cls, value: str, info: ValidationInfo) -> str:
        algorithm, pattern = info.data.get("algorithm", "magnitude"), info.data.get("pattern", "unstructured")
        if value == "model" and algorithm != "magnitude":
            raise ValueError(f"got 'model' with {algorithm}, expected 'layer'; see tcompress.global_ratios")
        if value == "model" and Pattern.parse(pattern).kind == "n_m":
            raise ValueError(f"got 'model' with {pattern}, expected 'layer': it says what each layer loses")
        return value
