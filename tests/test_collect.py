"""Layers with one input: found, and their statistics shared as long as it stays so."""

import torch
from torch import nn

from tcompress.collect import collect, layers_by_input
from tcompress.layer_job import Job
from tcompress.recipe import Quantize

STEP = Quantize(scheme="W4A16", algorithm="gptq")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.o, self.gate, self.up, self.spare = (nn.Linear(8, 8) for _ in range(6))

    def forward(self, x, split=False):
        other = x.clone() if split else x
        hidden = self.o(self.q(x) + self.k(other))
        return self.gate(hidden) * self.up(hidden)


def jobs(block):
    order = ["up", "o", "k", "spare", "q", "gate"]  # the order of the model is not that of the calls
    return {name: Job((name,), getattr(block, name), None, STEP) for name in order}


def names(groups):
    return [sorted(job.name for job in group) for group in groups]


def test_in_the_order_of_the_calls():
    block = Block()
    groups = layers_by_input(list(jobs(block).values()), lambda: block(torch.ones(3, 8)))
    assert names(groups) == [["k", "q"], ["o"], ["gate", "up"], ["spare"]]
    assert not any(m._forward_pre_hooks for m in block.modules())


def test_equal_values_are_not_one_input():
    block = Block()
    groups = layers_by_input(list(jobs(block).values()), lambda: block(torch.ones(3, 8), split=True))
    assert names(groups)[:2] == [["q"], ["k"]]


def test_shared_statistics():
    block, x = Block(), torch.randn(5, 8)
    all_jobs = jobs(block)
    groups = layers_by_input(list(all_jobs.values()), lambda: block(x))
    found = collect(groups, lambda: block(x))
    q, k, up, gate = (found[all_jobs[name].key] for name in ("q", "k", "up", "gate"))
    assert q is k
    assert up is gate
    assert q is not up
    torch.testing.assert_close(q.hessian, 2 * x.T @ x / 5)
    assert found[all_jobs["spare"].key].count == 0


def test_a_layer_that_is_given_something_else_after_all():
    block, all_jobs = Block(), None
    all_jobs = jobs(block)
    groups = layers_by_input(list(all_jobs.values()), lambda: block(torch.ones(3, 8)))
    xs = [torch.randn(5, 8), torch.randn(4, 8)]

    def run():
        block(xs[0])
        block(xs[1], split=True)

    found = collect(groups, run)
    first, second = (found[all_jobs[name].key] for name in ("q", "k"))
    assert first is not second
    assert first.count == second.count == 9
    torch.testing.assert_close(first.hessian, second.hessian)


def test_pairs():
    block, other = Block(), torch.randn(5, 8)
    x = other + 0.1
    (group, *_) = layers_by_input(list(jobs(block).values()), lambda: block(x))
    found = collect([group], lambda: None, [(lambda: block(other), lambda: block(x))])
    (statistics,) = {id(s): s for s in found.values()}.values()
    torch.testing.assert_close(statistics.shift, 2 * (other - x).T @ x / 5)
    assert statistics.count == 5
