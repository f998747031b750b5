"""Goes through a model block by block, so that what is done to one block is seen by the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import track
from torch import nn

from tcompress.blocks import BlockRunner, find_chains
from tcompress.collect import Key, collect_all
from tcompress.statistics import InputStatistics
from tcompress.weights import weight_key


@dataclass(frozen=True)
class Stage:
    """A part of the model.

    Attributes:
        block: of a chain; the whole model for what is outside of the chains, or where there are none.
        modules: those of `layers` that are in this part.
        run: calls the part on all samples, on what the parts before it give now.
        name: of the block.
    """

    block: nn.Module
    modules: list[nn.Module]
    run: Callable[[], None]
    name: str


def walk(
    model: nn.Module, samples: list[Any], layers: Collection[nn.Module], progress: bool = False
) -> Iterator[Stage]:
    """The blocks in the order in which the model runs them, then the rest of it, if any of `layers` is there.

    When the next stage is asked for, the one before runs as it is by then, and what it returns goes on. Layers of
    different blocks that share a weight are one stage: all of the model.

    Args:
        model: in evaluation mode without gradients (`calibrate.evaluating`), which the caller sees to.
    """
    names = {module: name for name, module in model.named_modules()}
    # A layer that is a block by itself may be replaced, and the chain would not know the new one.
    chains = [chain for chain in find_chains(model, samples[0]) if not any(block in layers for block in chain)]
    owner = {m: (c, b) for c, chain in enumerate(chains) for b, block in enumerate(chain) for m in block.modules()}
    places: dict[tuple[int, bool], set[tuple[int, int] | None]] = {}
    for layer in layers:
        places.setdefault(weight_key(layer), set()).add(owner.get(layer))
    if any(len(blocks) > 1 for blocks in places.values()):
        chains, owner = [], {}
    runner = BlockRunner(model, chains, samples)
    stages = [(c, b) for c, chain in enumerate(chains) for b in range(len(chain))]
    for stage in track(stages, "calibrating", disable=not progress, transient=True):
        block = chains[stage[0]][stage[1]]
        own = [layer for layer in layers if owner.get(layer) == stage]
        yield Stage(block, own, partial(runner.run, *stage, False), names[block])
        runner.run(*stage, keep=True)
    rest = [layer for layer in layers if layer not in owner]
    if rest or not chains:
        yield Stage(model, rest, runner.run_rest, "")


def collect(stage: Stage, hessian: bool) -> dict[Key, InputStatistics]:
    """The input statistics of a stage's layers; those with one weight or one input share theirs."""
    return collect_all([[layer] for layer in stage.modules], stage.run, hessian)
