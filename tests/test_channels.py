"""Groups of channels against what the derivative of the layers in between says."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from channel_models import Attention, Fused, Gated
from torch import nn

from tcompress.calibrate import evaluating
from tcompress.channels import find_groups


class Mixing(nn.Module):
    def __init__(self, between) -> None:
        super().__init__()
        self.a, self.between, self.b = nn.Linear(6, 8), between, nn.Linear(8, 6)

    def forward(self, x):
        return self.b(self.between(self.a(x)))


def groups_of(model, x=None):
    torch.manual_seed(0)
    x = torch.randn(2, 5, next(model.parameters()).shape[1]) if x is None else x
    with evaluating(model):
        return find_groups(model, lambda: model(x))


def names(model, group):
    of = {m: n for n, m in model.named_modules()}
    return of[group.consumer], [of[p.layer] for p in group.producers]


def reaches(model, group, x):
    """bool [units, units] by the derivative: whether a unit of outputs has a part in a unit of the consumer's input."""
    table = torch.zeros(group.count, group.count, dtype=torch.bool)
    caught = []

    def leaf(out):
        caught.append(out.detach().requires_grad_())
        return caught[-1]

    handles = [group.consumer.register_forward_pre_hook(lambda m, a: caught.append(a[0]))]
    for producer in group.producers:
        handle = producer.layer.register_forward_hook(
            lambda m, a, out: caught.append(out.detach().requires_grad_()) or caught[-1]
        )
        handles.append(handle)
    model(x)
    for h in handles:
        h.remove()
    given, outputs = caught[-1], caught[:-1]
    for j in range(group.count):
        wanted = given[..., group.inputs == j].square().sum()
        for producer, gradient in zip(
            group.producers, torch.autograd.grad(wanted, outputs, retain_graph=True), strict=True
        ):
            hit = gradient.flatten(0, -2).abs().amax(0) > 0
            for i in range(group.count):
                table[i, j] |= bool(hit[producer.units == i].any())
    return table


@pytest.mark.parametrize(
    ("model", "consumer", "producers", "count"),
    [
        (nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 3)), "2", ["0"], 10),
        (Gated(), "down", ["gate", "up"], 10),
        (Fused(in_turn=True), "down", ["both"], 10),
        (Fused(in_turn=False), "down", ["both"], 10),
        (Attention(), "o", ["q", "k", "v"], 2),
        (Attention(6, 6), "o", ["q", "k", "v"], 6),
        (Attention(4, 4, fused=True), "o", ["qkv"], 4),
    ],
    ids=["relu", "gated", "in turn", "chunks", "shared keys", "heads", "fused heads"],
)
def test_units_keep_to_themselves(model, consumer, producers, count):
    model.double()
    x = torch.randn(2, 5, next(model.parameters()).shape[1], dtype=torch.float64)
    (group,) = groups_of(model, x).groups
    assert names(model, group) == (consumer, producers)
    assert group.count == count
    assert torch.equal(reaches(model, group, x), torch.eye(count, dtype=torch.bool))
    assert group.is_heads == (consumer == "o")


@pytest.mark.parametrize("between", [nn.LayerNorm(8), nn.Softmax(-1)])
def test_a_norm_between_mixes(between):
    model = Mixing(between)
    found = groups_of(model)
    assert found.groups == []
    assert "every input" in found.reasons[model.a]


def test_what_goes_past_is_left():
    class Past(Gated):
        def forward(self, x):
            up = self.up(x)
            return self.down(F.silu(self.gate(x)) * up) + up[..., :6]

    model = Past()
    found = groups_of(model)
    assert [names(model, g) for g in found.groups] == [("down", ["gate"])]
    assert "past" in found.reasons[model.up]


def test_called_twice_or_never():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.idle = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            return self.b(F.relu(self.a(F.relu(self.a(x)))))

    model = Twice()
    found = groups_of(model)
    assert found.groups == []
    assert "more than once" in found.reasons[model.a]
    assert "not called" in found.reasons[model.idle]
