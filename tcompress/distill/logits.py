"""Logits: the teacher's probabilities, softened by a temperature."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.distill.loss import Term, mean_over, same_output, token_mask
from tcompress.distill.seen import Seen
from tcompress.recipe.losses import LogitsLoss


def soft_cross_entropy(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """T² · KL(softmax(t/T) ‖ softmax(s/T)), the mean over all rows; Hinton et al., "Distilling the Knowledge in a
    Neural Network", arXiv 1503.02531, section 2: the factor T² makes up for the gradient's 1/T². (The paper has the
    cross-entropy, which differs by the teacher's entropy, a constant.)

    Args:
        student, teacher: logits [..., C], computed in float32.
        tokens: bool [B, T] of logits [B, T, C], which count; None for all.

    Returns:
        A scalar, 0 where the two agree.
    """
    log_q = F.log_softmax(student.float() / temperature, -1)
    log_p = F.log_softmax(teacher.float() / temperature, -1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    return temperature**2 * mean_over(divergence, token_mask(tokens, divergence))


class LogitsTerm(Term[LogitsLoss]):
    """`soft_cross_entropy` of the models' outputs, which are logits over the last axis."""

    def check(self, student: Seen, teacher: Seen) -> None:
        same_output(student, teacher, "logits", "vocabulary or classes")

    def __call__(self, student: Seen, teacher: Seen, batch: Any, learned: nn.Module | None) -> torch.Tensor:
        return soft_cross_entropy(student.output, teacher.output, self.settings.temperature, student.tokens)
