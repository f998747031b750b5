"""Takes units of channels out of the layers that they pass through, and checks that nothing else changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

from tcompress.channels import Group, output_of
from tcompress.structure import mark_attributes, mark_size, set_linear
from tcompress.weights import is_conv1d, linear_bias, linear_weight

#: So many sets of whole numbers are tried.
_MAX_TRIALS = 64


def slice_group(group: Group, kept: torch.Tensor, part: nn.Module, run: Callable[[], Any]) -> str | None:
    """Makes a group's layers smaller, in place.

    A unit that goes is one whose channels the consumer reads as zero. So the consumer must give, with its smaller
    input, what it gave with zeros there. The whole numbers that must change with the sizes (num_heads, split_size …)
    are found by trying: of those that are multiples of the count, the fewest that shrink in proportion with that
    result.

    Args:
        kept: bool [units].
        part, run: the part of the model that the group was found in, and what runs it, on the same inputs each time.

    Returns:
        None, or why the group stays as it was.
    """
    trial, before = _Trial(group, kept, part, run), _snapshot(group)
    _slice_layers(group, kept)
    reason = "nothing was tried"
    for i, numbers in enumerate(_sets_of_numbers(group, trial.left)):
        found = trial.with_numbers(numbers)
        if found is None:
            # Others that say the same, which nothing in this computation reads.
            for number in _that_name_sizes(group, trial.left):
                if number not in numbers and trial.with_numbers([number]) is None:
                    numbers = [*numbers, number]
            for module, name in numbers:
                mark_attributes(module, [name])
            for layer, _, _ in before:
                mark_size(layer)
            return None
        reason = found if i == 0 else reason
        if i == _MAX_TRIALS:
            break
    for layer, values, bias in before:
        set_linear(layer, values, bias)
    return reason


class _Trial:
    """Whether a sliced group computes what it did with zeros, with some whole numbers smaller."""

    def __init__(self, group: Group, kept: torch.Tensor, part: nn.Module, run: Callable[[], Any]) -> None:
        self.group, self.part, self.run, self.left = group, part, run, int(kept.sum())
        expected, self.shapes = _with_zeros(group, kept, part, run)
        self.expected = expected.float()
        eps: float = torch.finfo(linear_weight(group.consumer).dtype).eps
        self.tolerance = 3 * eps**0.5 * float(self.expected.norm())

    def with_numbers(self, numbers: Sequence[tuple[nn.Module, str]]) -> str | None:
        """None where it does, and the numbers stay smaller; or why not, and they are what they were."""
        old = [getattr(module, name) for module, name in numbers]
        for (module, name), value in zip(numbers, old, strict=True):
            setattr(module, name, value * self.left // self.group.count)
        reason = self._why_not()
        if reason is not None:
            for (module, name), value in zip(numbers, old, strict=True):
                setattr(module, name, value)
        return reason

    def _why_not(self) -> str | None:
        try:
            got, shapes = output_of(self.group.consumer, self.part, self.run)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            return f"the model does not run with less: {str(error).splitlines()[0][:100] if str(error) else error!r}"
        if shapes != self.shapes:
            return "the sizes go on to other blocks"
        if got.shape != self.expected.shape or float((got.float() - self.expected).norm()) > self.tolerance:
            return "with less of it the model computes something else"
        return None


def _with_zeros(
    group: Group, kept: torch.Tensor, part: nn.Module, run: Callable[[], Any]
) -> tuple[torch.Tensor, list[torch.Size]]:
    mask = kept[group.inputs]

    def zeros(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * mask.to(args[0]), *args[1:])

    handle = group.consumer.register_forward_pre_hook(zeros)
    try:
        return output_of(group.consumer, part, run)
    finally:
        handle.remove()


def _snapshot(group: Group) -> list[tuple[nn.Module, torch.Tensor, torch.Tensor | None]]:
    layers = [group.consumer, *(producer.layer for producer in group.producers)]
    values: list[tuple[nn.Module, torch.Tensor, torch.Tensor | None]] = []
    for m in layers:
        bias = linear_bias(m)
        values.append((m, m.get_parameter("weight").detach(), None if bias is None else bias.detach()))
    return values


def _slice_layers(group: Group, kept: torch.Tensor) -> None:
    for producer in group.producers:
        rows = kept[producer.units].nonzero()[:, 0]
        bias = linear_bias(producer.layer)
        values = linear_weight(producer.layer).detach()[rows]
        _set(producer.layer, values, None if bias is None else bias.detach()[rows])
    columns = kept[group.inputs].nonzero()[:, 0]
    _set(group.consumer, linear_weight(group.consumer).detach()[:, columns], None)


def _set(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    set_linear(layer, weight.t().contiguous() if is_conv1d(layer) else weight.contiguous(), bias)


def _able(group: Group, left: int) -> list[tuple[nn.Module, str]]:
    return [(m, name) for m, name in group.numbers if getattr(m, name) * left % group.count == 0]


def _sets_of_numbers(group: Group, left: int) -> Iterator[Sequence[tuple[nn.Module, str]]]:
    """Sets of whole numbers, none first and then the smallest: a ratio of heads to heads must not shrink with them."""
    able = _able(group, left)
    for size in range(len(able) + 1):
        yield from combinations(able, size)


def _that_name_sizes(group: Group, left: int) -> list[tuple[nn.Module, str]]:
    """Numbers that are the width of a producer or of the consumer's input, and not that of its output, or that are by
    their name a number of heads."""
    hidden = linear_weight(group.consumer).shape[0]
    widths = {len(group.inputs), *(len(producer.units) for producer in group.producers)} - {hidden}
    return [
        (m, name)
        for m, name in _able(group, left)
        if getattr(m, name) in widths or re.search(r"(num|n)_.*heads?$|^n_heads?$", name)
    ]


def repaired(weight: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    """The columns that stay, refitted: min ‖W X - W' X_S‖² + λ‖W' - W_S‖², of which the solution is

        W' = W_S + W_R H_RS (H_SS + λ I)⁻¹

    with S what stays and R what goes, as in Kwon et al., "A Fast Post-Training Pruning Framework for Transformers",
    arXiv 2204.09656, section 4.3 (mask tuning, there one factor a unit), or the update of optimal brain surgery for a
    set of columns.

    Args:
        weight: [N, K]. hessian: [K, K], of its inputs up to a factor. kept: bool [K].
        damping: λ, times the mean of H's diagonal.

    Returns:
        [N, number of kept], in the type of the weight.
    """
    w, h = weight.detach().double(), hessian.double().to(weight.device)
    s, r = kept.nonzero()[:, 0], (~kept).nonzero()[:, 0]
    own = h[s][:, s]
    own.diagonal().add_(damping * max(float(h.diagonal().mean()), 1e-30))
    update = torch.linalg.solve(own, h[s][:, r] @ w[:, r].T)
    return (w[:, s] + update.T).to(weight.dtype)
