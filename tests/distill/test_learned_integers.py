"""Integers and scales that are trained begin where they were found, and are packed as they were trained."""

import pytest
import torch
from torch import nn

from tcompress.distill.learned_integers import LearnedIntegers
from tcompress.quantize import Scheme, round_to_nearest

NAMES = ["W8A8", "W7A7", "W4A8", "W4A8-g32", "W4A7-g64-asym", "W4A16-g32-asym"]


def learned(name, mask=None, rate=5.0, shape=(9, 70)):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0])
    args = Scheme.named(name).weights
    weight = layer.weight.detach() if mask is None else layer.weight.detach() * mask
    packed = round_to_nearest(weight, args, range="mse")
    masks = {} if mask is None else {"layer": mask}
    return layer, packed, LearnedIntegers({"layer": layer}, {"layer": packed}, {"layer": args}, masks, rate)


@pytest.mark.parametrize("name", NAMES)
def test_it_begins_with_what_was_found(name):
    layer, packed, constraint = learned(name)
    weight = constraint.maps()[layer](layer.weight)
    assert torch.equal(weight, packed.dequantize())
    again = constraint.packed("layer")
    for kind in ("qdata", "scale", "zero_point"):
        ours, theirs = getattr(again, kind), getattr(packed, kind)
        assert (ours is None and theirs is None) or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
    assert constraint.moved() == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_packed_weight_is_the_trained_one(name):
    layer, packed, constraint = learned(name)
    optimizer = torch.optim.SGD(constraint.parameters(), 0.1)
    for _ in range(5):
        weight = constraint.maps()[layer](layer.weight)
        (weight * torch.randn_like(weight)).sum().backward()
        for parameter in constraint.parameters():
            parameter.grad.sign_()
        optimizer.step()
        optimizer.zero_grad()
    weight = constraint.maps()[layer](layer.weight)
    assert torch.equal(constraint.packed("layer").dequantize(), weight)  # bit for bit
    assert constraint.moved() > 0.1
    assert not torch.equal(weight, packed.dequantize())
    q = constraint.integers("layer")
    low, high = constraint._limits("layer")
    assert int(q.min()) >= low
    assert int(q.max()) <= high


def test_the_gradients_by_hand():
    layer, packed, constraint = learned("W4A16-g32", shape=(2, 64))
    constraint.get_parameter("moved_0").data.fill_(0.02)  # 5 · 0.02 of a step: nothing is rounded elsewhere
    weight = constraint.maps()[layer](layer.weight)
    outer = torch.randn(2, 64)
    (weight * outer).sum().backward()
    scale = packed.scale.float()
    values = weight.detach() / scale.repeat_interleave(32, 1)
    of_ratio = (outer * values).view(2, 2, 32).sum(2) * scale
    assert torch.allclose(constraint.get_parameter("ratio_0").grad, of_ratio, rtol=1e-4, atol=1e-6)
    top = values + 0.1 > 7  # off the grid: -8 … 7
    of_moved = (5.0 * outer * scale.repeat_interleave(32, 1)).masked_fill(top, 0)
    assert torch.allclose(constraint.get_parameter("moved_0").grad, of_moved, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_weights_stay_zero(name):
    mask = torch.rand(9, 70, generator=torch.Generator().manual_seed(1)) > 0.5
    layer, _, constraint = learned(name, mask)
    constraint.get_parameter("moved_0").data.normal_()
    weight = constraint.maps()[layer](layer.weight)
    assert not weight[~mask].any()
    assert weight[mask].count_nonzero() > 0.7 * mask.sum()
    assert torch.equal(constraint.packed("layer").dequantize(), weight)


def test_integers_can_be_left_alone():
    layer, packed, constraint = learned("W4A16-g32", rate=0.0)
    assert [name for name, _ in constraint.named_parameters()] == ["ratio_0"]
    constraint.get_parameter("ratio_0").data.fill_(0.25)
    found = constraint.packed("layer")
    assert torch.equal(found.qdata, packed.qdata)
    assert torch.equal(found.scale, (packed.scale.float() * 1.25).half())
    assert torch.equal(constraint.maps()[layer](layer.weight), found.dequantize())
