"""Cosine of embeddings: of each token's, or of the whole text's."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.distill.loss import Term, mean_over, same_output, token_mask
from tcompress.distill.seen import Seen
from tcompress.recipe.losses import CosineLoss


def cosine_distance(
    student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor | None = None, pooled: bool = False
) -> torch.Tensor:
    """1 - cos(student, teacher), the mean over the rows; Sanh et al., "DistilBERT", arXiv 1910.01108, section 2, L_cos.

    Args:
        student, teacher: [B, T, D], or [..., D]; computed in float32.
        tokens: bool [B, T], which count; None for all.
        pooled: compare the means over the tokens [B, D] instead, which is what a sentence encoder is asked for
            (Reimers and Gurevych, "Sentence-BERT", arXiv 1908.10084, section 3). Only [B, T, D] is pooled.
    """
    own, its = student.float(), teacher.float()
    if pooled and own.dim() == 3:
        weight = own.new_ones(own.shape[:2]) if tokens is None else tokens.to(own.dtype)
        total = weight.sum(1, keepdim=True).clamp_min(1)
        own, its = ((x * weight[..., None]).sum(1) / total for x in (own, its))
    distance = 1 - F.cosine_similarity(own, its, dim=-1)
    return mean_over(distance, token_mask(tokens, distance))


class CosineTerm(Term[CosineLoss]):
    """`cosine_distance` of the models' outputs."""

    def check(self, student: Seen, teacher: Seen) -> None:
        same_output(student, teacher, "cosine", "features")

    def __call__(self, student: Seen, teacher: Seen, batch: Any, learned: nn.Module | None) -> torch.Tensor:
        return cosine_distance(student.output, teacher.output, student.tokens, self.settings.pooled)
