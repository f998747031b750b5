"""Finds the weights of all layers of a recipe that algorithms with calibration data have a part in, block by block."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import nn

from tcompress.blocks import BlockRunner, find_chains, forward_replaced
from tcompress.calibrate import batches, evaluating
from tcompress.errors import message
from tcompress.match import Match
from tcompress.packing import PackedWeight
from tcompress.prune import sparsegpt, wanda_mask
from tcompress.prune_step import Pruned
from tcompress.quantize import QuantArgs, gptq, round_to_nearest
from tcompress.recipe import Prune, Quantize, Recipe
from tcompress.statistics import InputStatistics
from tcompress.weights import is_conv1d, linear_weight


@dataclass(frozen=True)
class Solution:
    """What was found for a layer.

    Attributes:
        weight: [N, K], as it will compute; empty where `packed` has it.
        mask: what pruning keeps, or None.
        packed: the integers, or None where the weight stays in floating point.
    """

    weight: torch.Tensor
    mask: torch.Tensor | None
    packed: PackedWeight | None


@dataclass(frozen=True)
class _Job:
    """A layer to solve: pruned, quantized, or first one and then the other."""

    names: tuple[str, ...]
    module: nn.Module
    pruned: Pruned | None
    args: QuantArgs | None
    gptq: bool

    @property
    def method(self) -> str:
        return "magnitude" if self.pruned is None else self.pruned.step.algorithm

    @property
    def needs_hessian(self) -> bool:
        return self.gptq or self.method == "sparsegpt"

    @property
    def needs_data(self) -> bool:
        return self.needs_hessian or self.method == "wanda"

    @property
    def key(self) -> tuple[int, bool]:
        """Equal for layers with one weight."""
        return id(self.module.weight), is_conv1d(self.module)


def steps_with_data(recipe: Recipe) -> list[Prune | Quantize]:
    """The steps whose algorithm decides by the inputs of layers."""
    return [step for step in recipe.steps if isinstance(step, Prune | Quantize) and step.needs_data]


def solve(
    model: nn.Module,
    recipe: Recipe,
    matches: Sequence[Match],
    pruned: Mapping[nn.Module, Pruned],
    converted: Mapping[nn.Module, nn.Module],
    data: Any,
    progress: bool = False,
) -> tuple[dict[nn.Module, Solution], list[Any], list[str]]:
    """Solves the linear layers of a recipe in the order in which the model runs them.

    Block by block (`blocks.find_chains`): the inputs of a block's layers are collected while the block runs as it is,
    all its layers are solved, and it runs again with their new weights to give the next block its inputs. So each
    block makes up for the errors of the ones before, as in GPTQ, section 4; with `Recipe.inputs` "original" all inputs
    are those of the model as it is. Layers outside of blocks come last. At any time one block's Hessians are in memory,
    and what one block returned for the data. Where there are no blocks, all layers are solved after one pass over the
    model as it is. Weights are replaced, activations are not quantized meanwhile. The model is left as it was.

    A layer's input tokens with NaN or infinity are left out (`InputStatistics`). A layer that is never called is pruned
    by magnitude and rounded to nearest. Both are reported.

    Args:
        matches, pruned, converted: as found in the model for the recipe.
        data: batches, clean (`Samples`).

    Returns:
        Solutions by module; the samples that were used; what there is to report.

    Raises:
        ValueError: no data where a step needs them, or none that can be used; or what the algorithms raise, with the
            layer's name.
    """
    steps = steps_with_data(recipe)
    if data is None:
        needs = f"{steps[0].step}: {steps[0].algorithm} decides by the inputs of layers"
        raise ValueError(message("compress", "data", "none", "calibration samples", needs))
    notes: list[str] = []
    samples = list(batches(data))
    jobs = _jobs(matches, pruned)
    with evaluating(model), ExitStack() as stack:
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if (
                    child is not None and child in converted
                ):  # torch's attention, whose projections are layers only after that
                    parent._modules[name] = converted[child]
                    stack.callback(parent._modules.__setitem__, name, child)
                    stack.enter_context(evaluating(converted[child]))
        chains = find_chains(model, samples[0])
        owner = {m: (c, b) for c, chain in enumerate(chains) for b, block in enumerate(chain) for m in block.modules()}
        if _tied_across(jobs, owner):
            chains, owner = [], {}
        if not chains and len(jobs) > 1:
            notes.append("no sequence of blocks to go through: all layers were solved on the original model's inputs")
        runner = BlockRunner(model, chains, samples)
        solved: dict[tuple[int, bool], Solution] = {}
        stages = [(c, b) for c, chain in enumerate(chains) for b in range(len(chain))]
        original = recipe.inputs == "original"
        for stage in track(stages, "calibrating", disable=not progress, transient=True):
            own = [job for job in jobs if owner.get(job.module) == stage]
            if original or any(job.needs_data for job in own):
                statistics = _collect(own, partial(runner.run, *stage, original))
                _solve_all(own, statistics, solved, notes)
                del statistics
            else:
                _solve_all(own, {}, solved, notes)
            if not original:
                with ExitStack() as block:
                    for job in own:
                        block.enter_context(forward_replaced(job.module, _linear(job.module, solved[job.key].weight)))
                    runner.run(*stage, keep=True)
            solved |= {job.key: _without_copy(solved[job.key]) for job in own}
        rest = [job for job in jobs if job.module not in owner]
        if rest:
            needed = any(job.needs_data for job in rest)
            _solve_all(rest, _collect(rest, runner.run_rest) if needed else {}, solved, notes)
            solved |= {job.key: _without_copy(solved[job.key]) for job in rest}
    return {job.module: solved[job.key] for job in jobs}, samples, notes


def _jobs(matches: Sequence[Match], pruned: Mapping[nn.Module, Pruned]) -> list[_Job]:
    jobs = []
    for m in matches:
        if isinstance(m.module, nn.Embedding):
            continue
        scheme = m.scheme if isinstance(m.step, Quantize) else None
        by_gptq = isinstance(m.step, Quantize) and m.step.algorithm == "gptq"
        jobs.append(_Job(m.names, m.module, pruned.get(m.module), None if scheme is None else scheme.weights, by_gptq))
    done = {job.module for job in jobs}
    return jobs + [_Job(p.names, module, p, None, False) for module, p in pruned.items() if module not in done]


def _tied_across(jobs: Sequence[_Job], owner: Mapping[nn.Module, tuple[int, int]]) -> bool:
    places: dict[tuple[int, bool], set[tuple[int, int] | None]] = {}
    for job in jobs:
        places.setdefault(job.key, set()).add(owner.get(job.module))
    return any(len(blocks) > 1 for blocks in places.values())


def _collect(jobs: Collection[_Job], run: Any) -> dict[tuple[int, bool], InputStatistics]:
    """The statistics of all layers that need them; layers with one weight share theirs."""
    statistics: dict[tuple[int, bool], InputStatistics] = {}
    with ExitStack() as stack:
        for job in jobs:
            if job.needs_data:
                weight = linear_weight(job.module)
                if job.key not in statistics:
                    hessian = any(other.needs_hessian for other in jobs if other.key == job.key)
                    statistics[job.key] = InputStatistics(weight.shape[1], hessian, weight.device)
                hook = statistics[job.key].hook
                stack.callback(job.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run()
    return statistics


def _solve_all(
    jobs: Sequence[_Job],
    statistics: Mapping[tuple[int, bool], InputStatistics],
    solved: dict[tuple[int, bool], Solution],
    notes: list[str],
) -> None:
    for job in jobs:
        if job.key in solved:
            continue
        name, found = job.names[0] or "(root)", statistics.get(job.key)
        if found is not None and found.left_out:
            total = found.count + found.left_out
            notes.append(f"{name}: {found.left_out} of {total} input tokens left out: NaN or infinity")
        if found is not None and found.count == 0:
            notes.append(f"{name} has no calibration inputs: by magnitude and rounding to nearest instead")
            found = None
        try:
            solved[job.key] = _solution(job, found)
        except ValueError as error:
            raise ValueError(f"compress: {name}: {error}") from error


def _solution(job: _Job, statistics: InputStatistics | None) -> Solution:
    weight, mask = linear_weight(job.module).detach(), None
    if job.pruned is not None:
        step, mask = job.pruned.step, job.pruned.mask
        if statistics is not None and step.algorithm == "sparsegpt":
            args = job.args if job.gptq else None
            found = sparsegpt(weight, statistics, step.pattern, step.sparsity, args)
            if found.packed is not None:
                return Solution(found.weight, found.mask, found.packed)
            weight, mask = found.weight.to(weight.dtype), found.mask
        else:
            if statistics is not None and step.algorithm == "wanda":
                mask = wanda_mask(weight, statistics, step.pattern, step.sparsity)
            weight = weight.masked_fill(~mask, 0)
    if job.args is None:
        return Solution(weight, mask, None)
    by_gptq = job.gptq and statistics is not None
    packed = gptq(weight, statistics, job.args) if by_gptq else round_to_nearest(weight, job.args)  # type: ignore[arg-type]
    return Solution(packed.dequantize(), mask, packed)


def _without_copy(solution: Solution) -> Solution:
    """Of a quantized layer only the integers are kept; the report gives the floats again."""
    if solution.packed is None:
        return solution
    return Solution(solution.weight.new_empty(0), solution.mask, solution.packed)


def _linear(module: nn.Module, weight: torch.Tensor) -> Any:
    weight = weight.to(linear_weight(module).dtype)
    return lambda input: F.linear(input, weight, module.bias)  # type: ignore[arg-type]
