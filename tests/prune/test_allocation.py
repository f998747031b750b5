"""Ratios of layers against one sort of all scores, and against all ways to spend a small budget."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from tcompress.prune.allocation import by_ranking, by_sensitivity


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.3, 0.5, 0.99, 1.0])
def test_one_threshold_for_all(sparsity):
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=generator) * scale for n, scale in ((50, 1.0), (200, 2.0), (7, 0.1))]
    got = by_ranking(scores, sparsity)
    threshold = np.sort(np.concatenate([s.numpy() for s in scores]))
    number = round(sparsity * 257)
    expected = [int((s.numpy() <= threshold[number - 1]).sum()) if number else 0 for s in scores]
    assert [round(r * len(s)) for r, s in zip(got, scores, strict=True)] == expected


def test_ties_go_from_the_first():
    assert by_ranking([torch.ones(4), torch.ones(4)], 0.5) == [1.0, 0.0]
    assert by_ranking([torch.ones(4), torch.ones(4)], 0.5, most=0.75) == [0.75, 0.25]


def test_no_layer_loses_more_than_the_most():
    scores = [torch.rand(100) * 1e-3, torch.rand(100) * 1e-2, torch.rand(100) + 1]
    got = by_ranking(scores, 0.6, most=0.8)
    assert got[:2] == [0.8, 0.8]
    assert sum(got) == pytest.approx(1.8)
    assert by_ranking([torch.rand(10)], 0.8, most=0.8) == [0.8]


def test_ranking_errors():
    for arguments in (([torch.rand(3)], 0.9, 0.8), ([torch.rand(3)], -0.1), ([torch.tensor([torch.nan])], 0.5)):
        with pytest.raises(ValueError, match="by_ranking: .*got .*expected"):
            by_ranking(*arguments)


def cost(errors, ratios, found):
    return sum(float(np.interp(r, ratios, e)) for e, r in zip(errors, found, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_no_way_to_spend_the_budget_is_cheaper(seed):
    """Of errors that rise ever faster the greedy way is the best; where it ends within a step, along the line."""
    rng = np.random.default_rng(seed)
    ratios = [0.0, 0.25, 0.5, 0.75]
    errors = [np.cumsum([0, *np.sort(rng.random(3))]) * scale for scale in (1.0, 3.0, 0.2)]
    sizes = [4, 8, 4]
    got = by_sensitivity(errors, ratios, sizes, 0.375)
    assert sum(r * n for r, n in zip(got, sizes, strict=True)) == pytest.approx(6)
    whole = [
        cost(errors, ratios, choice)
        for choice in product(ratios, repeat=3)
        if sum(r * n for r, n in zip(choice, sizes, strict=True)) == 6
    ]
    assert cost(errors, ratios, got) <= min(whole) + 1e-9


def test_a_hump_is_jumped_over():
    """The way to a higher ratio is cheaper a weight than the one to the next."""
    got = by_sensitivity([[0, 5.0, 5.1], [0, 3.0, 6.0]], [0.0, 0.3, 0.6], [10, 10], 0.3)
    assert got == [0.6, 0.0]


def test_all_or_nothing():
    assert by_sensitivity([[0, 1.0]], [0.0, 0.5], [10], 0.0) == [0.0]
    assert by_sensitivity([[0, 1.0], [0, 2.0]], [0.0, 0.5], [10, 10], 0.5) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("ratios", "sparsity"), [([0.1, 0.5], 0.3), ([0.0, 0.5, 0.4], 0.3), ([0.0, 0.5], 0.6), ([], 0.1)]
)
def test_sensitivity_errors(ratios, sparsity):
    with pytest.raises(ValueError, match="by_sensitivity: .*got .*expected"):
        by_sensitivity([[0.0] * len(ratios)], ratios, [10], sparsity)
