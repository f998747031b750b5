"""The step that trains the integers and scales that quantization found."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tcompress.recipe.learning import Learning, Losses
from tcompress.recipe.step import Step


class Finetune(Step, Learning):
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
    losses: Losses = Field(({"loss": "logits", "temperature": 1.0},), validate_default=True)
    steps: int = Field(100, ge=1)
    lr: float = Field(2e-3, gt=0)
    integer_rate: float = Field(5.0, ge=0)
