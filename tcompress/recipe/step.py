"""What all steps of a recipe share."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, field_validator


class Step(BaseModel):
    """One thing to do to a model; frozen.

    Attributes:
        step: which kind, in YAML and JSON.
        targets: which modules. A class name ("Linear", subclasses included), a glob over names
            ("encoder.layer.*.dense"), a last name ("query"), or "re:" and a regular expression matched from the start.
        ignore: which of them not, in the same language. "lm_head" also means a model's output embeddings, whatever
            their name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    step: str
    targets: tuple[str, ...] = ("Linear", "Conv1D")
    ignore: tuple[str, ...] = ("lm_head",)

    @field_validator("targets", "ignore", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class Transform(Step):
    """A step that turns the model into another one in floating point, before the layers are pruned and quantized
    (`tcompress.transform`)."""
