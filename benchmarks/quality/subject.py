"""A pretrained model with data on which its quality is measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class Scores:
    """What a model got.

    Attributes:
        metric: the number that labels give.
        outputs: [n, D] float, what the metric was read from: embeddings, or logits. A model's are compared with those
            of the model before compression, since a metric of a few hundred samples moves in coarse steps.
        more: further metrics by name.
    """

    metric: float
    outputs: torch.Tensor
    more: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A model and its measure.

    Attributes:
        name: of the model.
        model: in float32 and eval mode.
        calibration: samples for `tcompress.compress`, none of which is evaluated.
        evaluate: the scores of this model or a compressed one.
        metric: its name; `higher` if more is better.
        counted: the samples that are evaluated, and those of the calibration, in words.
        change: how far a metric moved: "relative", or "points" where it is a share that is near zero.
        outputs: what the outputs are: "embeddings" are compared by cosine, "logits" by KL divergence.
    """

    name: str
    model: nn.Module
    calibration: list[Any]
    evaluate: Callable[[nn.Module], Scores]
    metric: str
    counted: str
    higher: bool = True
    change: Literal["relative", "points"] = "relative"
    outputs: Literal["embeddings", "logits"] = "embeddings"

    def loss(self, before: Scores, after: Scores) -> float:
        """How much worse the metric got, as a share or in shares of one; negative if it got better."""
        worse = before.metric - after.metric if self.higher else after.metric - before.metric
        return worse / before.metric if self.change == "relative" else worse

    def distance(self, before: Scores, after: Scores) -> float:
        """1 - mean cosine of embeddings; of logits the mean KL(before ‖ after) in nats. 0 is no difference."""
        pairs = zip(before.outputs.split(256), after.outputs.split(256), strict=True)
        if self.outputs == "embeddings":
            total = sum(float((1 - F.cosine_similarity(a.double(), b.double(), dim=-1)).sum()) for a, b in pairs)
        else:
            total = sum(_kl(a, b) for a, b in pairs)
        return total / len(before.outputs)


def _kl(before: torch.Tensor, after: torch.Tensor) -> float:
    p, q = (F.log_softmax(logits.double(), dim=-1) for logits in (before, after))
    return float(F.kl_div(q, p, reduction="sum", log_target=True))
