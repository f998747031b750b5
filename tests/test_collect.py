"""Layers with one input: found, and their statistics shared as long as it stays so; as many at a time as fit."""

import torch
from torch import nn

from tcompress.collect import collect, collect_all, layers_by_input
from tcompress.statistics import InputStatistics
from tcompress.weights import weight_key


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o, self.gate, self.up, self.spare = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x, split=False):
        other = x.clone() if split else x
        hidden = self.o(self.q(x) + self.k(other))
        return self.gate(hidden) * self.up(hidden)


ORDER = ["up", "o", "k", "spare", "q", "gate"]  # the order of the model is not that of the calls


def layers(block, names=ORDER):
    return [getattr(block, name) for name in names]


def names(block, groups):
    own = {module: name for name, module in block.named_children()}
    return [sorted(own[module] for module in group) for group in groups]


def of(block, found, *wanted):
    return [found[weight_key(getattr(block, name))] for name in wanted]


def test_in_the_order_of_the_calls():
    block = Block()
    groups = layers_by_input(layers(block), lambda: block(torch.ones(3, 8)))
    assert names(block, groups) == [["k", "q"], ["o"], ["gate", "up"], ["spare"]]
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_equal_values_are_not_one_input():
    block = Block()
    groups = layers_by_input(layers(block), lambda: block(torch.ones(3, 8), split=True))
    assert names(block, groups)[:2] == [["q"], ["k"]]


def test_shared_statistics():
    block, x = Block(), torch.randn(5, 8)
    found = collect_all([[m] for m in layers(block)], lambda: block(x), hessian=True)
    q, k, up, gate, spare = of(block, found, "q", "k", "up", "gate", "spare")
    assert q is k
    assert up is gate
    assert q is not up
    torch.testing.assert_close(q.hessian, 2 * x.T @ x / 5)
    assert spare.count == 0
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_a_hessian_only_of_those_that_want_it():
    block, x = Block(), torch.randn(5, 8)
    found = collect_all([layers(block)], lambda: block(x), hessian={weight_key(block.k), weight_key(block.o)})
    q, k, o, up = of(block, found, "q", "k", "o", "up")
    assert k.hessian is not None
    assert o.hessian is not None
    assert up.hessian is None
    assert q.hessian is None  # it was called before k, and so k has its own
    assert torch.equal(q.norm, k.norm)


def test_a_layer_that_is_given_something_else_after_all():
    block = Block()
    xs = [torch.randn(5, 8), torch.randn(4, 8)]

    def run():
        block(xs[0])
        block(xs[1], split=True)

    first, second = of(block, collect_all([layers(block)], run, hessian=True), "q", "k")
    assert first is not second
    assert first.count == second.count == 9
    torch.testing.assert_close(first.hessian, second.hessian)


def test_a_layer_that_is_called_less_often():
    block, x = Block(), torch.randn(5, 8)

    def run():
        block(x)
        block.q(x)

    q, k = of(block, collect_all([layers(block)], run, hessian=True), "q", "k")
    assert (q.count, k.count) == (10, 5)


def test_pairs():
    block, other = Block(), torch.randn(5, 8)
    x = other + 0.1
    found = collect_all([[block.q, block.k]], lambda: None, True, [(lambda: block(other), lambda: block(x))])
    (statistics,) = {id(s): s for s in found.values()}.values()
    torch.testing.assert_close(statistics.shift, 2 * (other - x).T @ x / 5)
    assert statistics.count == 5


def test_as_many_at_a_time_as_fit():
    block, x = Block(), torch.randn(5, 8)
    groups = layers_by_input(layers(block), lambda: block(x))
    whole = collect_all(groups, lambda: block(x), hessian=True)
    one = 8 * 8 * 4
    for limit, passes in ((1, 4), (one, 4), (2 * one, 2), (3 * one, 2), (4 * one, 1), (None, 1)):
        parts = list(collect(groups, lambda: block(x), hessian=True, limit=limit))
        assert len(parts) == passes
        found = {key: statistics for part in parts for key, statistics in part.items()}
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key].hessian, whole[key].hessian) for key in found)


def test_one_weight_is_collected_at_once_whatever_fits():
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    xs = torch.randn(5, 8), torch.randn(4, 8)

    def run():
        first(xs[0])
        second(xs[1])

    ((statistics,),) = [part.values() for part in collect([[first], [second]], run, hessian=True, limit=1)]
    assert statistics.count == 9


def test_rows():
    block = Block()
    xs = [torch.randn(10, 8), torch.randn(7, 8)]
    xs[1][3, 2] = torch.inf

    def run():
        for x in xs:
            block(x)

    found = collect_all([[block.q]], run, hessian=False, rows=10)
    expected = torch.cat([xs[0], xs[1][:3], xs[1][4:]])
    assert torch.equal(of(block, found, "q")[0].rows, expected)
    assert isinstance(of(block, found, "q")[0], InputStatistics)
