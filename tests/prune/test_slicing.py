"""Slicing against the model with zeros, and the repair against least squares."""

from __future__ import annotations

import copy

import pytest
import torch
from calibrated import correlated, output_error, statistics_of, weight
from channel_models import Attention, Fused, Gated
from torch import nn

from tcompress.calibrate import evaluating
from tcompress.channels import find_groups
from tcompress.prune.slicing import repaired, slice_group


def masked(group, kept):
    def zeros(module, args):
        return (args[0] * kept[group.inputs].to(args[0]), *args[1:])

    return group.consumer.register_forward_pre_hook(zeros)


class Counting(Attention):
    """Wants to know how many heads it has; and has a ratio that must not shrink with them."""

    def __init__(self) -> None:
        super().__init__(6, 2)
        self.ratio, self.kv_heads, self.index = 3, 2, 4

    def forward(self, x):
        b, s, _ = x.shape
        q = self.q(x).view(b, s, self.heads, self.size).transpose(1, 2)
        k, v = (m(x).view(b, s, self.kv_heads, self.size).transpose(1, 2) for m in (self.k, self.v))
        k, v = (t.repeat_interleave(self.ratio, 1) for t in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return x + self.o(y.transpose(1, 2).reshape(b, s, self.heads * self.size))


@pytest.mark.parametrize(
    "model", [Gated(), Fused(True), Fused(False), Attention(), Attention(4, 4, fused=True), Counting()]
)
def test_it_computes_what_it_did_with_zeros(model):
    torch.manual_seed(0)
    x = torch.randn(3, 5, next(model.parameters()).shape[1])
    other = torch.randn(2, 7, x.shape[-1])
    size = sum(p.numel() for p in model.parameters())
    with evaluating(model):
        (group,) = find_groups(model, lambda: model(x)).groups
        kept = torch.arange(group.count) % 2 == 0
        handle = masked(group, kept)
        expected = model(other)
        handle.remove()
        assert slice_group(group, kept, model, lambda: model(x)) is None
        torch.testing.assert_close(model(other), expected)
    assert sum(p.numel() for p in model.parameters()) < size
    if isinstance(model, Counting):
        assert (model.heads, model.kv_heads, model.ratio, model.size, model.index) == (3, 1, 3, 4, 4)


def test_what_cannot_be_sliced_stays():
    class Fixed(Gated):
        """A table as long as the channels, which no number gives."""

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.rand(10))

        def forward(self, x):
            return self.down(self.up(x) * self.table)

    model = Fixed()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 6)
    with evaluating(model):
        (group,) = find_groups(model, lambda: model(x)).groups
        reason = slice_group(group, torch.arange(10) < 5, model, lambda: model(x))
    assert "does not run" in reason
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.up.out_features == 10


def test_the_repair_is_least_squares():
    w, x = weight(6, 20).double(), correlated(20).double()
    kept = torch.arange(20) % 3 != 0
    got = repaired(w, x.T @ x, kept, damping=0.0)
    expected = torch.linalg.lstsq(x[:, kept], x @ w.T).solution.T
    torch.testing.assert_close(got, expected, atol=1e-8, rtol=1e-6)


def test_the_repair_keeps_what_stays_where_it_knows_nothing():
    w = weight(6, 20)
    kept = torch.arange(20) < 12
    torch.testing.assert_close(repaired(w, torch.zeros(20, 20), kept), w[:, kept])
    torch.testing.assert_close(repaired(w, torch.eye(20), kept), w[:, kept])


def test_the_repair_helps():
    w, x = weight(16, 24), correlated(24)
    kept = torch.arange(24) % 4 != 0
    without, with_repair = torch.zeros(16, 24), torch.zeros(16, 24)
    without[:, kept] = w[:, kept]
    with_repair[:, kept] = repaired(w, statistics_of(x).hessian, kept)
    assert output_error(w, with_repair, x) < 0.6 * output_error(w, without, x)
