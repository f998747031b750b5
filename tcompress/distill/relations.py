"""MiniLM's relations: how alike the queries, keys and values of the tokens of one text are to each other."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.distill.attention_maps import allowed_pairs, check_calls
from tcompress.distill.loss import Term, mean_over
from tcompress.distill.seen import AttentionCall, Seen
from tcompress.errors import message
from tcompress.recipe.losses import RelationsLoss

Kind = Literal["qq", "kk", "vv", "qk"]


def relation_kl(
    student: AttentionCall,
    teacher: AttentionCall,
    kind: Kind,
    heads: int,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """KL(R_T ‖ R_S), the mean over heads and tokens, of R = softmax(A Bᵀ / √d) with A and B of "qq", "kk" or "vv" once
    concatenated over the heads and split into `heads` relation heads of width d; Wang et al., "MiniLMv2", arXiv
    2012.15828, section 3.1. "qk" is the attention distribution itself, which "MiniLM" (arXiv 2002.10957, section 3.1)
    takes beside "vv" (section 3.2).

    Args:
        heads: divides H·D of both models, whose numbers of heads may differ.
        tokens: bool [B, T], which count; None for all.
    """
    where = allowed_pairs(student, tokens)
    log_s, log_t = (_log_relation(call, kind, heads, where) for call in (student, teacher))
    divergence = torch.where(log_t.isfinite(), log_t.exp() * (log_t - log_s), 0).sum(-1)
    rows = None
    if tokens is not None and tokens.shape[1] == divergence.shape[-1]:
        rows = tokens[:, None, :]
    return mean_over(divergence, rows)


def _log_relation(call: AttentionCall, kind: Kind, heads: int, where: torch.Tensor | None) -> torch.Tensor:
    parts = {"q": call.query, "k": call.key, "v": call.value}
    a, b = (_resplit(parts[letter], heads) for letter in kind)
    scores = a @ b.transpose(-1, -2) / math.sqrt(a.shape[-1])
    if where is not None and where.shape[-1] == scores.shape[-1]:
        # The lowest number and not -inf: a row of padding, where nothing is allowed, would give NaN.
        scores = scores.masked_fill(~where, torch.finfo(scores.dtype).min)
    return F.log_softmax(scores, -1)


def _resplit(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, H, S, D] -> [B, heads, S, H·D/heads]."""
    b, h, s, d = x.shape
    return x.float().transpose(1, 2).reshape(b, s, heads, h * d // heads).transpose(1, 2)


class RelationsTerm(Term[RelationsLoss]):
    """The mean of `relation_kl` over kinds, of the student's last block and one of the teacher's. MiniLMv2 takes the
    last of 12 and one of the upper middle of 24 (section 3.2).
    """

    needs_hidden: ClassVar[bool] = True
    needs_attention: ClassVar[bool] = True

    def _calls(self, student: Seen, teacher: Seen) -> tuple[list[AttentionCall], list[AttentionCall]]:
        """Of the last chain: an encoder's, or the decoder's."""
        return student.attention[-1][-1], teacher.attention[-1][self.settings.teacher_layer]

    def check(self, student: Seen, teacher: Seen) -> None:
        where = "distill: relations"
        if not student.attention or not teacher.attention:
            got = "no sequence of blocks in the " + ("student" if teacher.attention else "teacher")
            raise ValueError(message(where, "blocks", got, "at least one"))
        n = len(teacher.attention[-1])
        if not -n <= self.settings.teacher_layer < n:
            raise ValueError(
                message(where, "teacher_layer", self.settings.teacher_layer, f"one of the teacher's {n} blocks")
            )
        own, its = self._calls(student, teacher)
        check_calls(own, its, where)
        heads = self.settings.heads or its[0].query.shape[1]
        for whose, calls in (("student", own), ("teacher", its)):
            width = calls[0].query.shape[1] * calls[0].query.shape[3]
            if width % heads:
                got = f"a {whose} of width {width}"
                raise ValueError(message(where, "heads", got, f"one that {heads} relation heads divide", "set heads"))
        if own[0].query.shape[2] != its[0].query.shape[2]:
            got = f"{own[0].query.shape[2]} tokens in the student"
            raise ValueError(message(where, "tokens", got, f"the teacher's {its[0].query.shape[2]}"))

    def __call__(self, student: Seen, teacher: Seen, batch: Any, learned: nn.Module | None) -> torch.Tensor:
        own, its = self._calls(student, teacher)
        heads = self.settings.heads or its[0].query.shape[1]
        losses = [relation_kl(own[0], its[0], kind, heads, student.tokens) for kind in self.settings.kinds]
        return torch.stack(losses).mean()
