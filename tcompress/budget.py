"""Choosing one candidate for each of many items under a budget: a multiple-choice knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tcompress.errors import message


@dataclass(frozen=True)
class Candidate:
    """What a choice costs of the budget, and the loss it means."""

    cost: float
    loss: float


def choose_within(items: Sequence[Mapping[str, Candidate]], budget: float, where: str = "choose") -> list[str]:
    """The candidate of each item, so that the sum of the losses is small and that of the costs at most the budget.

    Of each item's candidates those on the lower convex hull of (cost, loss) count. All items begin with their cheapest
    one; then the step along a hull that takes most loss away for its cost is made, as long as it fits, and past those
    that do not fit smaller ones are tried. What is left over is less than one step; the result is the optimum of the
    relaxed problem but for that (Sinha and Zoltners 1979, "The Multiple-Choice Knapsack Problem", section 2).

    Args:
        items: candidates by name.
        where: begins error messages.

    Raises:
        ValueError: the cheapest candidates exceed the budget.
    """
    hulls = [_hull(options) for options in items]
    chosen = [0] * len(items)
    left = budget - sum(hull[0][1].cost for hull in hulls)
    if left < -1e-9 * abs(budget):
        least = budget - left
        raise ValueError(message(where, "budget", f"{budget:.6g}", f"at least {least:.6g}, the cheapest candidates"))
    for _, i, to in _steps(hulls):
        cost = hulls[i][to][1].cost - hulls[i][chosen[i]][1].cost
        if to == chosen[i] + 1 and cost <= left:
            chosen[i], left = to, left - cost
    return [hull[c][0] for hull, c in zip(hulls, chosen, strict=True)]


def choose_within_loss(items: Sequence[Mapping[str, Candidate]], max_loss: float, where: str = "choose") -> list[str]:
    """The other way round: small costs under a bound of the summed loss. Every step of `choose_within` is made, in its
    order, until the bound is met; then those that are not needed are taken back, the dearest first.

    Raises:
        ValueError: the best candidates exceed the bound.
    """
    hulls = [_hull(options) for options in items]
    chosen = [0] * len(items)
    loss = sum(hull[0][1].loss for hull in hulls)
    for _, i, to in _steps(hulls):
        if loss <= max_loss:
            break
        loss += hulls[i][to][1].loss - hulls[i][chosen[i]][1].loss
        chosen[i] = to
    if loss > max_loss:
        raise ValueError(message(where, "budget", f"{max_loss:.6g}", f"at least {loss:.6g}, the best candidates"))
    back = sorted(range(len(items)), key=lambda i: -_saving(hulls[i], chosen[i]))
    for i in back:
        while chosen[i] and loss + hulls[i][chosen[i] - 1][1].loss - hulls[i][chosen[i]][1].loss <= max_loss:
            loss += hulls[i][chosen[i] - 1][1].loss - hulls[i][chosen[i]][1].loss
            chosen[i] -= 1
    return [hull[c][0] for hull, c in zip(hulls, chosen, strict=True)]


def _saving(hull: Sequence[tuple[str, Candidate]], at: int) -> float:
    return hull[at][1].cost - hull[at - 1][1].cost if at else 0.0


def _hull(options: Mapping[str, Candidate]) -> list[tuple[str, Candidate]]:
    """The candidates on the lower convex hull, by rising cost and falling loss."""
    hull: list[tuple[str, Candidate]] = []
    for name, c in sorted(options.items(), key=lambda item: (item[1].cost, item[1].loss)):
        if hull and c.loss >= hull[-1][1].loss:
            continue
        while len(hull) > 1 and _rate(hull[-2][1], hull[-1][1]) <= _rate(hull[-1][1], c):
            hull.pop()
        if hull and c.cost == hull[-1][1].cost:
            hull.pop()
        hull.append((name, c))
    return hull


def _rate(one: Candidate, other: Candidate) -> float:
    """Loss taken away for each unit of cost."""
    return (one.loss - other.loss) / (other.cost - one.cost) if other.cost > one.cost else float("inf")


def _steps(hulls: Sequence[Sequence[tuple[str, Candidate]]]) -> list[tuple[float, int, int]]:
    """All steps along all hulls, (rate, item, to which), the best first; those of one hull in its order."""
    steps = [(_rate(hull[k - 1][1], hull[k][1]), i, k) for i, hull in enumerate(hulls) for k in range(1, len(hull))]
    return sorted(steps, key=lambda step: (-step[0], step[1], step[2]))
