"""Hard labels, beside what the teacher says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.distill.loss import Term
from tcompress.distill.seen import Seen
from tcompress.errors import message
from tcompress.recipe.losses import LabelsLoss


class LabelsTerm(Term[LabelsLoss]):
    """Cross-entropy of the student's logits with the batch's "labels", -100 left out."""

    def __call__(self, student: Seen, teacher: Seen, batch: Any, learned: nn.Module | None) -> torch.Tensor:
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        logits = student.output.float()
        if labels is None:
            got = f"a batch ({type(batch).__name__}) without them"
            raise ValueError(message("distill", "labels", got, 'a mapping with "labels"'))
        if labels.shape != logits.shape[:-1]:
            expected = f"{list(logits.shape[:-1])}, as the logits {list(logits.shape)}"
            raise ValueError(message("distill", "labels", list(labels.shape), expected))
        if self.settings.causal:
            logits, labels = logits[:, :-1], labels[:, 1:]
        return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=-100)
