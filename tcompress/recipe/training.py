"""How long and how fast a model is trained."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Training(BaseModel):
    """The settings of a training run; frozen.

    Attributes:
        steps: updates of the weights.
        lr: the highest learning rate of AdamW (arXiv 1711.05101).
        warmup: which part of the steps the learning rate rises from 0 for.
        schedule: what it does then: fall to 0 in a line or along half a cosine, or stay.
        weight_decay: of weights with two axes or more; biases and norms have none.
        max_grad_norm: gradients whose L2 norm is larger are scaled to it; None for never.
        accumulate: batches an update.
        dropout: whether the student's dropout is active. A compressed model that learns its own outputs again does
            better without.
        mixed_precision: of accelerate.
        seed: of the order of batches, dropout, and what is learned from scratch. A seed decides the result, on one
            machine with one number of threads, bit for bit.
        eval_every, save_every: steps between two evaluations, and two checkpoints.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    steps: int = Field(1000, ge=1)
    lr: float = Field(5e-5, gt=0)
    warmup: float = Field(0.1, ge=0, le=1)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float | None = Field(1.0, gt=0)
    accumulate: int = Field(1, ge=1)
    dropout: bool = False
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    seed: int = Field(0, ge=0, lt=2**31)
    eval_every: int = Field(100, ge=1)
    save_every: int = Field(100, ge=1)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, from 0."""
        warm = round(self.warmup * self.steps)
        if step < warm:
            return self.lr * (step + 1) / (warm + 1)
        done = (step - warm) / max(self.steps - warm, 1)
        if self.schedule == "linear":
            return self.lr * (1 - done)
        return self.lr * (0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1.0)
