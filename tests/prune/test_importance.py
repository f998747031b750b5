"""Importance against what happens when a unit is scaled or goes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from calibrated import correlated, statistics_of, weight
from torch import nn

from tcompress.calibrate import evaluating
from tcompress.channels import find_groups
from tcompress.prune.importance import (
    BlockInfluence,
    activation_importance,
    taylor_importance,
    weight_importance,
)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 4)

    def forward(self, x, labels=None):
        out = self.b(torch.tanh(self.a(x)))
        return {"out": out} if labels is None else {"loss": nn.functional.cross_entropy(out, labels), "out": out}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return WithLoss().double()


def group_of(model):
    x = torch.randn(7, 5, dtype=torch.float64)
    with evaluating(model):
        (group,) = find_groups(model, lambda: model(x)).groups
    return group


@pytest.mark.parametrize("width", [1, 4])
def test_activation_is_what_a_unit_adds_to_the_output(width):
    w, x = weight(6, 16), correlated(16)
    inputs = torch.arange(16) // width
    got = activation_importance(w, statistics_of(x).hessian, inputs, 16 // width)
    for unit, value in enumerate(got):
        own = inputs == unit
        part = (x[:, own].double() @ w[:, own].double().T).square().sum()
        assert float(value) == pytest.approx(float(part / len(x)), rel=1e-4)


def test_taylor_is_the_slope_of_the_loss(model):
    group = group_of(model)
    generator = torch.Generator().manual_seed(0)
    samples = [
        {
            "x": torch.randn(6, 5, generator=generator, dtype=torch.float64),
            "labels": torch.randint(4, (6,), generator=generator),
        }
        for _ in range(3)
    ]
    flags = [p.requires_grad for p in model.parameters()]
    (got,) = taylor_importance(model, [group], samples)
    assert [p.requires_grad for p in model.parameters()] == flags
    expected = np.zeros(8)
    for unit in range(8):
        for sample in samples:
            losses = []
            for step in (1e-5, -1e-5):
                factor = torch.ones(8, dtype=torch.float64)
                factor[unit] += step
                out = model.b(torch.tanh(model.a(sample["x"])) * factor)
                losses.append(nn.functional.cross_entropy(out, sample["labels"]).item())
            expected[unit] += abs(losses[0] - losses[1]) / 2e-5 / 3
    assert np.allclose(got.numpy(), expected, rtol=1e-5)


def test_taylor_is_weight_times_gradient(model):
    group = group_of(model)
    sample = {"x": torch.randn(6, 5, dtype=torch.float64), "labels": torch.randint(4, (6,))}
    (got,) = taylor_importance(model, [group], [sample])
    model(**sample)["loss"].backward()
    assert torch.allclose(got, (model.b.weight * model.b.weight.grad).sum(0).abs())


def test_taylor_without_labels_moves_with_the_output(model):
    """The mean over random signs of |s·d| is near |d| for each unit's change d of the output."""
    group = group_of(model)
    x = torch.randn(6, 5, dtype=torch.float64)
    (got,) = taylor_importance(model, [group], [{"x": x}] * 400)
    hidden = torch.tanh(model.a(x))
    moved = torch.stack([torch.outer(hidden[:, u], model.b.weight[:, u]).norm() for u in range(8)]) / 24**0.5
    assert torch.allclose(got, moved.detach() * (2 / np.pi) ** 0.5, rtol=0.25)


def test_weight_is_a_norm_over_all_that_a_unit_has(model):
    got = weight_importance(group_of(model))
    expected = (model.a.weight.square().sum(1) + model.b.weight.square().sum(0)).sqrt()
    assert torch.allclose(got, expected.detach())


def test_block_influence():
    found = BlockInfluence()
    a, b = (np.random.default_rng(seed).standard_normal((2, 3, 4)) for seed in (0, 1))
    found.hook(nn.Identity(), (torch.from_numpy(a),), {}, (torch.from_numpy(b), None))
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    assert found.value == pytest.approx(float((1 - cosine).mean()))
    assert BlockInfluence().value == float("inf")
    same = BlockInfluence()
    same.hook(nn.Identity(), (), {"x": torch.ones(2, 4)}, torch.ones(2, 4) * 3)
    assert same.value == pytest.approx(0, abs=1e-6)
