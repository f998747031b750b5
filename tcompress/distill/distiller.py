"""A student and its teacher on one batch: the objective of a distillation, checked before it is trained for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from tcompress.blocks import find_chains
from tcompress.calibrate import evaluating
from tcompress.distill.constraint import Constraint
from tcompress.distill.seen import Seen, see, without_labels
from tcompress.distill.terms import TERMS
from tcompress.errors import message
from tcompress.recipe.losses import Loss


class Distiller(nn.Module):
    """The losses of a student against a teacher. Its state is that of the student, of what the losses learn and of the
    constraints; the teacher, which does not change, is none of it.

    Args:
        student: what is trained.
        teacher: stays in evaluation mode.
        losses: the terms.
        constraints: whose penalties are added.
        batch: on which all is checked.

    Raises:
        ValueError: teacher and student do not fit together; the message has the sizes.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        losses: Sequence[Loss],
        constraints: Sequence[Constraint],
        batch: Any,
    ) -> None:
        super().__init__()
        check_vocabularies(student, teacher)
        self.student = student
        self._teacher = [teacher]  # in a list, which does not make it a child
        self.constraints = nn.ModuleList(constraints)
        self._terms = [TERMS[type(loss)](loss) for loss in losses]
        self._attention = any(term.needs_attention for term in self._terms)
        hidden = any(term.needs_hidden for term in self._terms)
        with evaluating(student), evaluating(teacher):
            plain = without_labels(teacher, batch)
            self._chains = _chains(student, teacher, plain) if hidden else [[], []]
            own, its = (
                see(m, batch, c, self._attention) for m, c in zip((student, teacher), self._chains, strict=True)
            )
            for whose, seen in (("student", own), ("teacher", its)):
                if not torch.isfinite(seen.output).all():
                    raise ValueError(message("distill", f"the {whose}'s output", "NaN or infinity", "finite"))
            self.learned = nn.ModuleDict()
            for term in self._terms:
                term.check(own, its)
                module = term.learned(own, its)
                if module is not None:
                    self.learned[term.settings.loss] = module.to(own.output.device)

    def forward(self, batch: Any) -> dict[str, torch.Tensor]:
        """Each loss and the penalties, weighted; their sum is what is minimised."""
        own = see(self.student, batch, self._chains[0], self._attention)
        its = self._taught(batch)
        losses = {}
        for term in self._terms:
            name = term.settings.loss
            learned = self.learned[name] if name in self.learned else None  # noqa: SIM401  a ModuleDict has no get
            losses[name] = term.settings.weight * term(own, its, batch, learned)
        for constraint in self.constraints:
            assert isinstance(constraint, Constraint)
            penalty = constraint.penalty()
            if penalty is not None:
                losses["penalty"] = losses.get("penalty", 0) + penalty
        return losses

    @torch.no_grad()
    def _taught(self, batch: Any) -> Seen:
        return see(self._teacher[0], batch, self._chains[1], self._attention)


def _chains(student: nn.Module, teacher: nn.Module, batch: Any) -> list[list[list[nn.Module]]]:
    """The sequences of blocks of both. The student's are those that are called as the teacher's are, where it has such:
    of one with few blocks, what lies inside of a block could be a longer sequence."""
    its = find_chains(teacher, batch)
    lists = {m[0]: name for name, m in teacher.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    own = []
    for chain in its:
        found = dict(student.named_modules()).get(lists[chain[0]])
        if not isinstance(found, nn.ModuleList) or not len(found):
            return [find_chains(student, batch), its]
        own.append(list(found))
    return [own, its]


def check_vocabularies(student: nn.Module, teacher: nn.Module) -> None:
    """Raises ValueError where the models' input embeddings have tables of different length."""
    sizes = []
    for model in (student, teacher):
        getter = getattr(model, "get_input_embeddings", None)
        try:
            table = getter() if callable(getter) else None
        except NotImplementedError:  # how transformers says that a model has none
            table = None
        sizes.append(getattr(table, "num_embeddings", None))
    own, its = sizes
    if own is not None and its is not None and own != its:
        hint = "both models need one tokenizer"
        raise ValueError(message("distill", "vocabulary", f"{own} tokens in the student", f"the teacher's {its}", hint))
