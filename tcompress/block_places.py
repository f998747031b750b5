"""In which of a model's blocks each of its layers stands, where the model can be gone through block by block."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from tcompress.blocks import find_chains
from tcompress.weights import weight_key

#: A chain's number, and a block's number in it.
Place = tuple[int, int]


@dataclass(frozen=True)
class BlockPlaces:
    """The blocks of a model, and what stands in them.

    Attributes:
        chains: of `blocks.find_chains`, each of different blocks; none where the model has to be taken as a whole.
        owner: the block of each module that is in one.
        why: there are no chains; empty where there are some.
    """

    chains: list[list[nn.Module]]
    owner: dict[nn.Module, Place] = field(default_factory=dict)
    why: str = ""


def find_places(model: nn.Module, batch: Any, layers: Collection[nn.Module]) -> BlockPlaces:
    """The blocks through which one can go, doing the layers of each before the next one is run.

    A block that is called at several places is none of these: its layers would have to be done at the first call, on
    the inputs of that one alone. Neither is one that is itself a layer to be done: it may be replaced, and the next
    block would still be given what the old one returned. Nor are there any where one of the layers, or its weight, is
    used in several blocks.

    Args:
        model: in evaluation mode.
        batch: one, on which it is run.
        layers: linear layers, and what else has a weight.
    """
    apart = set(layers)
    chains = find_chains(
        model, batch, lambda blocks: len(set(blocks)) == len(blocks) and not apart.intersection(blocks)
    )
    blocks_of: dict[nn.Module, set[Place]] = {}
    for c, chain in enumerate(chains):
        for b, block in enumerate(chain):
            for module in block.modules():
                blocks_of.setdefault(module, set()).add((c, b))
    places: dict[tuple[int, bool], set[Place | None]] = {}
    for layer in layers:
        places.setdefault(weight_key(layer), set()).update(blocks_of.get(layer, {None}))
    if any(len(found) > 1 for found in places.values()):
        return BlockPlaces([], {}, "blocks share weights")
    owner = {module: max(found) for module, found in blocks_of.items()}
    return BlockPlaces(chains, owner, "" if chains else "no sequence of blocks to go through")
