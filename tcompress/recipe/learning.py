"""What a step that learns from the original model has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from tcompress.recipe.losses import AnyLoss
from tcompress.recipe.training import Training


def _as_text(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _each_once(losses: tuple[AnyLoss, ...]) -> tuple[AnyLoss, ...]:
    kinds = [loss.loss for loss in losses]
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"losses: got {kinds}, expected each kind once")
    return losses


#: What is minimised: a kind of loss at most once.
Losses = Annotated[tuple[AnyLoss, ...], Field(min_length=1), AfterValidator(_each_once)]
#: A folder, from a path too.
Folder = Annotated[str | None, BeforeValidator(_as_text)]


class Learning(Training):
    """A step that trains a model to give what the original gives."""

    step: str
    losses: Losses = Field(("logits",), validate_default=True)
    checkpoint: Folder = None

    @property
    def training(self) -> Training:
        """Its settings of the training alone."""
        return Training(**{name: getattr(self, name) for name in Training.model_fields})
