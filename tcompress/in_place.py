"""Puts a block's compressed layers in their places as soon as the block is done, so that its floats go."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from tcompress import replace
from tcompress.calibrate import OutputError
from tcompress.input_scales import has_static
from tcompress.layer_job import Job, Key, Solution
from tcompress.layer_report import compressed_report
from tcompress.match import Match
from tcompress.memory import trim
from tcompress.recipe import Finetune, Quantize, Recipe
from tcompress.report.report import LayerReport
from tcompress.structure import carry
from tcompress.targeted import put
from tcompress.weights import is_masked_by_torch, weight_id


def with_solution(m: Match, found: Solution) -> Match:
    """A match with what was found for it."""
    weight = found.weight if found.packed is None else found.packed
    return dataclasses.replace(m, mask=found.mask, solved=weight, bias=found.bias, outliers=found.outliers)


def placed_at_once(recipe: Recipe, matches: Sequence[Match], attention: bool) -> bool:
    """Whether a block's layers may take their places as soon as the block is done, for nothing looks at the model as it
    was after that. Steps for attention, static activations and training do; and where AutoRound solves all blocks on
    the original's inputs, none runs again when it is solved.

    Args:
        attention: whether a step means any attention.
    """
    if attention or has_static(matches) or any(isinstance(step, Finetune) for step in recipe.steps):
        return False
    solved = [m.step for m in matches if not isinstance(m.module, nn.Embedding)]
    learned = any(isinstance(step, Quantize) and step.algorithm == "autoround" for step in solved)
    return not (learned and recipe.inputs == "original")


def placeable(model: nn.Module, matches: Sequence[Match]) -> dict[nn.Module, Match]:
    """The layers that can give up their weights: these are parameters, and no other module uses them."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    return {
        m.module: m
        for m in matches
        if isinstance(m.module._parameters.get("weight"), nn.Parameter)
        and not is_masked_by_torch(m.module)
        and users[weight_id(m.module)] == [m.module]
    }


class InPlace:
    """The layers of a model that are compressed in place, block by block.

    A layer whose place is taken gives up its weight, unless other modules use that: such a layer waits for the end. The
    output of each is compared with its replacement's while the block runs for the next one's inputs, on what it is
    given then.

    Args:
        model: to be changed.
        matches: all layers that will be replaced.
        cache: as for `replace.compressed`.
        not_pruned: of layers that a step was to prune and did not, why.

    Attributes:
        replaced: what took the place of a layer.
        reports: of these.
    """

    def __init__(
        self,
        model: nn.Module,
        matches: Sequence[Match],
        cache: replace.PackedCache,
        not_pruned: Mapping[nn.Module, str],
    ) -> None:
        self._model, self._cache, self._not_pruned = model, cache, not_pruned
        self._matches = placeable(model, matches)
        self.replaced: dict[nn.Module, nn.Module] = {}
        self.reports: dict[nn.Module, LayerReport] = {}
        self._ready: dict[nn.Module, OutputError] = {}

    @contextmanager
    def compared(self, jobs: Sequence[Job], solved: Mapping[Key, Solution]) -> Iterator[None]:
        """Makes the replacements of a block's layers, and compares them while the block runs."""
        with ExitStack() as stack:
            for job in jobs:
                match = self._matches.get(job.module)
                if match is not None:
                    new = replace.compressed(with_solution(match, solved[job.key]), self._cache)
                    self._ready[job.module] = error = OutputError(carry(job.module, new))
                    hook = _comparing(error)
                    stack.callback(job.module.register_forward_hook(hook, with_kwargs=True).remove)
            trim()
            yield

    def put(self) -> None:
        """Puts what was compared in its places; then the layers give up their weights.

        In this order: a run that ends in between leaves no layer in the model without its weight.
        """
        reports: dict[nn.Module, LayerReport] = {}
        for module, error in self._ready.items():
            report = compressed_report(self._matches[module], error.replacement, self._not_pruned.get(module, ""))
            reports[module] = report.model_copy(update={"output_sqnr_db": error.sqnr_db})
        new = {module: error.replacement for module, error in self._ready.items()}
        put(self._model, new)
        self.reports |= reports
        self.replaced |= new
        for module in new:
            weight = module.weight
            assert isinstance(weight, nn.Parameter)
            # It keeps its shape: what still refers to the layer asks for no more.
            weight.data = torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        self._ready = {}
        trim()


def _comparing(error: OutputError) -> Any:
    """A forward hook by which a layer, whatever stands in for its forward, is compared with its replacement."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        error.hook(module, args, kwargs, type(module).forward(module, *args, **kwargs))

    return hook
