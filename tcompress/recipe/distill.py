"""The step that trains a model to give what the original gave."""

from __future__ import annotations

from typing import Literal

from tcompress.recipe.learning import Learning
from tcompress.recipe.step import Transform
from tcompress.recipe.training_prune import TrainingPrune


class Distill(Transform, Learning):
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
    prune: TrainingPrune | None = None
    keep_zeros: bool = True
    quantization_aware: bool = True
