"""Goes through a model block by block, so that what is done to one block is seen by the next."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.progress import track
from torch import nn

from tcompress.block_places import find_places
from tcompress.blocks import BlockRunner
from tcompress.collect import Key, collect_all
from tcompress.statistics import InputStatistics


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

    When the next stage is asked for, the one before runs as it is by then, and what it returns goes on. All of the
    model is one stage where `find_places` says so.

    Args:
        model: in evaluation mode without gradients (`calibrate.evaluating`), which the caller sees to.
    """
    names = {module: name for name, module in model.named_modules()}
    places = find_places(model, samples[0], layers)
    chains, owner = places.chains, places.owner
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
