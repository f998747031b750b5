"""Attention maps: which tokens look at which."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tcompress.distill.loss import Term, layer_pairs, mean_over
from tcompress.distill.seen import AttentionCall, Seen
from tcompress.errors import message
from tcompress.recipe.losses import AttentionLoss


def attention_mse(student: AttentionCall, teacher: AttentionCall, tokens: torch.Tensor | None = None) -> torch.Tensor:
    """MSE(A_S, A_T) of the scores before the softmax, the mean over heads; Jiao et al., "TinyBERT", arXiv 1909.10351,
    section 3.1, equation 7. Scores of keys that a query may not attend to, and of queries that are padding, do not
    count.

    Args:
        tokens: bool [B, T]; where T is the number of queries, those that count.
    """
    error = (student.scores.float() - teacher.scores.float()).square()
    return mean_over(error, allowed_pairs(student, tokens))


def allowed_pairs(call: AttentionCall, tokens: torch.Tensor | None) -> torch.Tensor | None:
    """Which scores count, broadcasts to [B, H, Sq, Skv]; None for all."""
    allowed = call.allowed
    if tokens is None:
        return allowed
    n_query, n_key = call.query.shape[-2], call.key.shape[-2]
    for axis, n in ((tokens[:, None, :, None], n_query), (tokens[:, None, None, :], n_key)):
        if tokens.shape[1] == n:
            allowed = axis if allowed is None else allowed & axis
    return allowed


def check_calls(student: list[AttentionCall], teacher: list[AttentionCall], where: str) -> None:
    """Raises ValueError unless both blocks called attention, as often."""
    if not teacher or len(student) != len(teacher):
        got = f"{len(student)} calls in a block of the student and {len(teacher)} in the teacher's"
        hint = "attention is seen where it is torch's scaled_dot_product_attention: attn_implementation='sdpa'"
        raise ValueError(message(where, "attention", got, "as many, and at least one", hint))


class AttentionTerm(Term[AttentionLoss]):
    """The mean of `attention_mse` over the student's blocks, each with the teacher's that `layer_pairs` gives it; as
    many heads in both."""

    needs_hidden: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = True

    def check(self, student: Seen, teacher: Seen) -> None:
        for own, its in layer_pairs(student.attention, teacher.attention, "distill: attention"):
            check_calls(own, its, "distill: attention")
            for a, b in zip(own, its, strict=True):
                if a.query.shape[:-1] != b.query.shape[:-1] or a.key.shape[-2] != b.key.shape[-2]:
                    got, expected = f"Q {list(a.query.shape)} in the student", f"the teacher's {list(b.query.shape)}"
                    hint = "maps of other heads cannot be compared; the loss 'relations' takes any number"
                    raise ValueError(message("distill: attention", "heads", got, expected, hint))

    def __call__(self, student: Seen, teacher: Seen, batch: Any, learned: nn.Module | None) -> torch.Tensor:
        pairs = layer_pairs(student.attention, teacher.attention, "distill: attention")
        losses = [attention_mse(a, b, student.tokens) for own, its in pairs for a, b in zip(own, its, strict=True)]
        return torch.stack(losses).mean()
