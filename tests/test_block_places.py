"""Which of a model's blocks can be gone through one by one, and what stands in them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tcompress.block_places import find_places
from tcompress.block_walk import walk
from tcompress.calibrate import evaluating


class Block(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.act = inner, nn.ReLU()

    def forward(self, x):
        return x + self.act(self.inner(x))


class Model(nn.Module):
    def __init__(self, blocks):
        super().__init__()
        self.layers, self.head = nn.ModuleList(blocks), nn.Linear(4, 2)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


def linears(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear)]


def places_of(model, layers=None):
    with evaluating(model):
        return find_places(model, torch.randn(3, 4), linears(model) if layers is None else layers)


def test_each_module_has_its_block():
    model = Model(Block(nn.Linear(4, 4)) for _ in range(3))
    found = places_of(model)
    assert found.chains == [list(model.layers)]
    assert found.owner == {m: (0, b) for b, block in enumerate(model.layers) for m in block.modules()}
    assert found.why == ""


def test_one_block_three_times():
    found = places_of(Model(3 * [Block(nn.Linear(4, 4))]))
    assert (found.chains, found.owner) == ([], {})
    assert found.why == "no sequence of blocks to go through"


def shared_layer():
    layer = nn.Linear(4, 4)
    return Model(Block(layer) for _ in range(3))


def shared_in_a_module():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    return Model([Block(nn.Linear(4, 4)), Block(inner), Block(inner)])


def shared_weight():
    model = Model(Block(nn.Linear(4, 4)) for _ in range(3))
    model.layers[2].inner.weight = model.layers[0].inner.weight
    return model


@pytest.mark.parametrize("make", [shared_layer, shared_in_a_module, shared_weight])
def test_what_blocks_share(make):
    found = places_of(make())
    assert (found.chains, found.owner, found.why) == ([], {}, "blocks share weights")


def test_blocks_may_share_what_is_not_done():
    model = shared_layer()
    assert places_of(model, [model.head]).chains == [list(model.layers)]
    act = nn.ReLU()
    model = Model(Block(nn.Linear(4, 4)) for _ in range(2))
    for block in model.layers:
        block.act = act
    assert places_of(model).chains == [list(model.layers)]


class Deep(nn.Module):
    """A block of layers that run one after the other, more than there are blocks."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def test_blocks_that_are_layers():
    model = Model(nn.Linear(4, 4) for _ in range(3))
    assert places_of(model).chains == []
    assert places_of(model, [model.head]).chains == [list(model.layers)]
    model = Model(Deep() for _ in range(2))
    assert places_of(model).chains == [list(model.layers)]


def test_a_walk_through_them_calls_a_shared_layer_at_each_place():
    model = shared_in_a_module()
    layer, calls = model.layers[1].inner[0], []
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    with evaluating(model):
        for stage in walk(model, [torch.randn(3, 4)], linears(model)):
            if layer in stage.modules:
                calls.clear()
                stage.run()
                assert len(calls) == 2
                break
        else:
            pytest.fail("the layer is in no stage")
