"""The knapsack against trying everything."""

from itertools import product

import pytest
import torch

from tcompress.budget import Candidate, choose_within, choose_within_loss


def items(n, seed=0, m=3):
    generator = torch.Generator().manual_seed(seed)
    table = []
    for _ in range(n):
        costs = torch.rand(m, generator=generator).sort().values + 0.2
        losses = torch.rand(m, generator=generator).sort(descending=True).values.square()
        table.append({f"c{j}": Candidate(float(costs[j]), float(losses[j])) for j in range(m)})
    return table


def totals(table, chosen):
    picked = [options[name] for options, name in zip(table, chosen, strict=True)]
    return sum(c.cost for c in picked), sum(c.loss for c in picked)


@pytest.mark.parametrize("seed", range(8))
def test_losses_under_a_budget(seed):
    table = items(6, seed)
    least = sum(min(c.cost for c in options.values()) for options in table)
    most = sum(max(c.cost for c in options.values()) for options in table)
    everything = [totals(table, names) for names in product(*table)]
    for part in (0, 0.3, 0.6, 1):
        budget = least + part * (most - least)
        cost, loss = totals(table, choose_within(table, budget))
        assert cost <= budget + 1e-9
        best = min(other for c, other in everything if c <= budget + 1e-9)
        # Off the optimum by less than one item's largest step.
        step = max(max(c.loss for c in o.values()) - min(c.loss for c in o.values()) for o in table)
        assert loss <= best + step
    assert loss == pytest.approx(min(other for _, other in everything))


@pytest.mark.parametrize("seed", range(8))
def test_costs_under_a_loss(seed):
    table = items(6, seed)
    everything = [totals(table, names) for names in product(*table)]
    losses = [other for _, other in everything]
    for part in (0, 0.3, 1):
        bound = min(losses) + part * (max(losses) - min(losses)) + 1e-9
        cost, loss = totals(table, choose_within_loss(table, bound))
        assert loss <= bound
        best = min(c for c, other in everything if other <= bound)
        step = max(max(c.cost for c in o.values()) - min(c.cost for c in o.values()) for o in table)
        assert cost <= best + step


def test_dominated_candidates_are_never_chosen():
    table = [{"good": Candidate(1, 1), "dear": Candidate(2, 1), "bad": Candidate(1.5, 3), "best": Candidate(3, 0)}]
    assert choose_within(table, 2.5) == ["good"]
    assert choose_within(table, 3) == ["best"]


def test_a_step_that_does_not_fit_leaves_room_for_smaller_ones():
    table = [
        {"a": Candidate(1, 10), "b": Candidate(6, 0)},
        {"a": Candidate(1, 2), "b": Candidate(2, 1)},
    ]
    assert choose_within(table, 4) == ["a", "b"]


def test_budgets_that_nothing_meets():
    table = items(3)
    with pytest.raises(ValueError, match=r"choose: budget: got 0.1, expected at least .*, the cheapest candidates"):
        choose_within(table, 0.1)
    with pytest.raises(ValueError, match=r"choose: budget: got -1, expected at least .*, the best candidates"):
        choose_within_loss(table, -1.0)
