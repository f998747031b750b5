"""What all distillation losses share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import nn

from tcompress.distill.seen import Seen
from tcompress.errors import message
from tcompress.recipe.losses import Loss

S = TypeVar("S", bound=Loss)


class Term(Generic[S]):
    """Computes one kind of `recipe.losses.Loss`.

    Args:
        settings: what the recipe says of it.
    """

    #: Whether it looks at the outputs of blocks, and at their calls of attention.
    needs_hidden: ClassVar[bool] = False
    needs_attention: ClassVar[bool] = False

    def __init__(self, settings: S) -> None:
        self.settings = settings

    def check(self, student: Seen, teacher: Seen) -> None:
        """Raises ValueError, with the sizes, where teacher and student do not fit together. Called before training."""

    def learned(self, student: Seen, teacher: Seen) -> nn.Module | None:
        """What is trained along with the student and thrown away afterwards, or None."""
        return None

    def __call__(self, student: Seen, teacher: Seen, batch: Any, learned: nn.Module | None) -> torch.Tensor:
        """The loss, a scalar, without its weight."""
        raise NotImplementedError


def mean_over(values: torch.Tensor, where: torch.Tensor | None) -> torch.Tensor:
    """The mean of values over the True elements of a mask that broadcasts to them; 0 where none is."""
    if where is None:
        return values.mean()
    kept = where.expand(values.shape)
    return torch.where(kept, values, 0).sum() / kept.sum().clamp_min(1)


def token_mask(tokens: torch.Tensor | None, values: torch.Tensor) -> torch.Tensor | None:
    """The mask [B, T] for values [B, T], or None where there is none or the values are not of tokens."""
    return tokens if tokens is not None and tokens.shape == values.shape else None


def same_output(student: Seen, teacher: Seen, what: str, axis: str) -> None:
    """Raises ValueError unless both outputs have one shape; the message names both sizes of the last axis."""
    own, its = student.output.shape, teacher.output.shape
    if own == its:
        return
    if own[:-1] == its[:-1]:
        got, expected = f"{own[-1]} ({axis}) in the student", f"the teacher's {its[-1]}"
    else:
        got, expected = f"{list(own)} in the student", f"the teacher's {list(its)}"
    raise ValueError(message("distill", what, got, expected, "both models need one tokenizer and one set of outputs"))


T = TypeVar("T")


def layer_pairs(student: Sequence[Sequence[T]], teacher: Sequence[Sequence[T]], where: str) -> Iterator[tuple[T, T]]:
    """Each block of the student with the teacher's that it learns from: of M and N blocks, block m (from 1) with block
    m·N/M, rounded down; the uniform map of Jiao et al., "TinyBERT", arXiv 1909.10351, section 4.2.

    Raises:
        ValueError: chains of blocks that differ in number, or a student with more blocks; none at all.
    """
    counts = [len(chain) for chain in student], [len(chain) for chain in teacher]
    if not counts[1] or len(counts[0]) != len(counts[1]):
        got = f"{len(counts[0])} sequences of blocks in the student and {len(counts[1])} in the teacher"
        hint = "blocks are members of a ModuleList that run one after the other (tcompress.blocks)"
        raise ValueError(message(where, "blocks", got, "as many, and at least one", hint))
    for own, its in zip(student, teacher, strict=True):
        if len(own) > len(its):
            raise ValueError(
                message(where, "blocks", f"{len(own)} of the student", f"at most the teacher's {len(its)}")
            )
        for m, block in enumerate(own, 1):
            yield block, its[m * len(its) // len(own) - 1]
