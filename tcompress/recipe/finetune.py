"""The step that trains the integers and scales that quantization found."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tcompress.recipe.losses import AnyLoss
from tcompress.recipe.step import Step
from tcompress.recipe.training import Training


class Finetune(Step, Training):
    """Trains the integers and scales of the layers that `Quantize` steps made, all together, to give what the original
    model gives on the data (`tcompress.distill.learned_integers`). Whatever found the integers is where it begins: gptq
    and the like solve one layer after the other, this makes up for what they leave. It comes after all other steps,
    wherever it stands. Needs data, and `pip install tcompress[train]`.

    Attributes:
        losses: as of `Distill`; "logits" with temperature 1 by default.
        lr: how far a scale moves in one of AdamW's steps at most, as a part of itself.
        integer_rate: how far an integer moves then, in steps of its grid, as a multiple of `lr`; 0 leaves integers what
            they are.
        checkpoint: a folder, as of `Distill`; with `compress(resume=)` a folder in that one by default.
        targets, ignore: whose integers and scales are trained, as in `Step`; by default all that were quantized. Those
            with columns in floating point (`outliers`), embeddings and layers of `Sparse` steps stay as they are.
        steps, …: of `Training`.
    """

    step: Literal["finetune"] = "finetune"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    losses: tuple[AnyLoss, ...] = Field(({"loss": "logits", "temperature": 1.0},), min_length=1, validate_default=True)
    steps: int = Field(100, ge=1)
    lr: float = Field(2e-3, gt=0)
    integer_rate: float = Field(5.0, ge=0)
    checkpoint: str | None = None

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _each_once(self) -> Finetune:
        kinds = [loss.loss for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"losses: got {kinds}, expected each kind once")
        return self

    @property
    def training(self) -> Training:
        """Its settings of the training alone."""
        return Training(**{name: getattr(self, name) for name in Training.model_fields})
