"""The step that trains a model to give what the original gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from tcompress.recipe.losses import AnyLoss
from tcompress.recipe.step import Transform
from tcompress.recipe.training import Training
from tcompress.recipe.training_prune import TrainingPrune


class Distill(Transform, Training):
    """Trains the model, as the transforms and the `Prune` steps before it made it, to give what the original model
    gives on the data (`tcompress.distill`): its own outputs heal it. Needs data, and `pip install tcompress[train]`.

    Attributes:
        losses: the terms of what is minimised, by name or with their settings (`recipe.losses`): "logits",
            "labels", "hidden", "attention", "relations", "cosine".
        prune: pruning that goes on in the training, or None.
        keep_zeros: zeros in the weights of linear layers stay zero, exactly.
        quantization_aware: the schemes of the recipe's `Quantize` and `Sparse` steps are simulated in the training,
            wherever these stand.
        checkpoint: a folder. What it holds of a run with the same settings that was stopped is taken up, with a result
            identical to that of a run that was not; None for no checkpoints.
        targets, ignore: whose parameters are trained, as in `Step`; by default all.
        steps, lr, …: of `Training`.
    """

    step: Literal["distill"] = "distill"
    targets: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    losses: tuple[AnyLoss, ...] = Field(("logits",), min_length=1, validate_default=True)
    prune: TrainingPrune | None = None
    keep_zeros: bool = True
    quantization_aware: bool = True
    checkpoint: str | None = None

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _path(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @model_validator(mode="after")
    def _each_once(self) -> Distill:
        kinds = [loss.loss for loss in self.losses]
        if len(set(kinds)) < len(kinds):
            raise ValueError(f"losses: got {kinds}, expected each kind once")
        return self

    @property
    def training(self) -> Training:
        """Its settings of the training alone."""
        return Training(**{name: getattr(self, name) for name in Training.model_fields})
