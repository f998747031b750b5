"""Hidden states: what the blocks return, through a learned projection where the student is narrower."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn

from tcompress.distill.loss import Term, layer_pairs, mean_over, token_mask
from tcompress.distill.seen import Seen
from tcompress.errors import message
from tcompress.recipe.losses import HiddenLoss


def hidden_mse(
    student: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor | None = None, relative: bool = False
) -> torch.Tensor:
    """MSE(H_S, H_T) over the tokens that count; Jiao et al., "TinyBERT", arXiv 1909.10351, section 3.1, equation 8, the
    projection H_S W_h being applied already.

    Args:
        student, teacher: [B, T, D], computed in float32.
        tokens: bool [B, T], or None for all.
        relative: divide by the mean square of H_T. Blocks have outputs of very different size, and the largest would
            be all that is learned from. Not in the paper.
    """
    own, its = student.float(), teacher.float()
    error, size = (own - its).square().mean(-1), its.square().mean(-1)
    where = token_mask(tokens, error)
    loss = mean_over(error, where)
    return loss / mean_over(size, where).clamp_min(1e-12) if relative else loss


class HiddenTerm(Term[HiddenLoss]):
    """The mean of `hidden_mse` over the student's blocks, each with the teacher's block that `layer_pairs` gives it.

    One projection W_h, shared by all blocks of a chain, is learned where the widths differ.
    """

    needs_hidden: ClassVar[bool] = True

    def check(self, student: Seen, teacher: Seen) -> None:
        for own, its in layer_pairs(student.hidden, teacher.hidden, "distill: hidden"):
            if own.shape[:-1] != its.shape[:-1]:
                got, expected = (
                    f"{list(own.shape)} in the student",
                    f"the teacher's {list(its.shape)} but for the width",
                )
                raise ValueError(message("distill: hidden", "block output", got, expected))

    def learned(self, student: Seen, teacher: Seen) -> nn.Module | None:
        widths = [(own[0].shape[-1], its[0].shape[-1]) for own, its in zip(student.hidden, teacher.hidden, strict=True)]
        return nn.ModuleList(
            nn.Identity() if narrow == wide else nn.Linear(narrow, wide, bias=False) for narrow, wide in widths
        )

    def __call__(self, student: Seen, teacher: Seen, batch: Any, learned: nn.Module | None) -> torch.Tensor:
        assert isinstance(learned, nn.ModuleList)
        projected = [[w(h.float()) for h in chain] for w, chain in zip(learned, student.hidden, strict=True)]
        pairs = layer_pairs(projected, teacher.hidden, "distill: hidden")
        return torch.stack([hidden_mse(own, its, student.tokens, self.settings.relative) for own, its in pairs]).mean()
