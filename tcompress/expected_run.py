"""What is known of a run of `compress` before it: the largest of its parts, and how long each takes."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcompress import replace
from tcompress.block_places import Place, find_places
from tcompress.calibrate import run
from tcompress.expected_memory import MemoryEstimate, nbytes_became, packing_work
from tcompress.expected_training import learning_steps, training_memory, training_seconds
from tcompress.footprint import Footprint, measure
from tcompress.in_place import placeable, placed_at_once, with_solution
from tcompress.layer_job import Job, Solution
from tcompress.match import Match
from tcompress.memory import nbytes_of
from tcompress.memory_plan import MemoryPlan, Needs, needs_of, plan
from tcompress.quantize.autoround import RoundedWeight
from tcompress.quantize.range_search import find_grid
from tcompress.recipe import Finetune, Recipe, Transform
from tcompress.report.size import model_sizes
from tcompress.solve_layer import solve_layer
from tcompress.statistics import InputStatistics
from tcompress.weights import linear_weight

#: Calls that AutoRound learns by in an iteration, and times that it judges all of them.
_LEARNED, _JUDGED = 4, 11
#: Seconds within which a layer is solved twice, to know how long it takes.
_SHORT = 0.5
#: Inputs by which a layer is solved to see how long it takes.
_ROWS = 256


@dataclass(frozen=True)
class TimeEstimate:
    """Seconds of a run on this machine, as it is loaded now.

    Attributes:
        forward: the model on all samples, block by block.
        statistics: Hessians of layers' inputs.
        solving: layers.
        comparing: layers' outputs with what they were, for the report.
        training: all steps that train.
    """

    forward: float
    statistics: float
    solving: float
    comparing: float
    training: float

    @property
    def total(self) -> float:
        return self.forward + self.statistics + self.solving + self.comparing + self.training


class ExpectedRun:
    """What is known of a run before it."""

    def __init__(
        self,
        model: nn.Module,
        samples: list[Any],
        jobs: list[Job],
        matches: Sequence[Match],
        limit: int | None,
        by_data: bool,
        inplace: bool,
        recipe: Recipe,
        attention: bool = False,
    ) -> None:
        self._batches, samples = samples, samples[: recipe.samples]
        self._model, self._samples, self._jobs, self._inplace, self._inputs = (
            model,
            samples,
            jobs,
            inplace,
            recipe.inputs,
        )
        self._learning = learning_steps(recipe)
        #: Whether a copy of the model stands beside it all the time: the original that is to be learned from, or that
        #: the user keeps while transforms change the other.
        transforms = any(isinstance(step, Transform) for step in recipe.steps)
        self._finetunes = any(isinstance(step, Finetune) for step in recipe.steps)
        self._two = bool(self._learning) if inplace else transforms
        at_once = inplace and by_data and placed_at_once(recipe, matches, attention)
        self._leaving_early = placeable(model, matches) if at_once else {}
        self._match = {m.module: m for m in matches}
        known = {job.module for job in jobs}
        #: Embeddings are packed, not solved.
        self._all = [*jobs, *(Job(m.names, m.module, None, m.step) for m in matches if m.module not in known)]
        self._by_data = by_data
        self._chains: list[list[nn.Module]] = []
        self._owner: dict[nn.Module, Place] = {}
        self._measured = Footprint(0, 0, (), 0, (), 0.0, 0.0, ())
        self._needs, self._plan, self._parts = Needs(0, 0, 0, 0, 0, 0, 0, 0), MemoryPlan(), 0.0
        if samples:
            if by_data:
                places = find_places(model, samples[0], [job.module for job in jobs])
                self._chains, self._owner = places.chains, places.owner
            self._measured = measure(model, self._chains, samples[0], [job.module for job in jobs])
            sizes = [nbytes_of(sample) for sample in samples]
            self._parts = sum(sizes) / max(sizes[0], 1)
            self._needs = needs_of(jobs, self._owner, self._measured, samples)
            self._plan = plan(limit, self._needs)

    def memory(self) -> MemoryEstimate:
        """The largest of the parts of a run."""
        needs, model = self._needs, model_sizes(self._model).resident
        beside = model if self._two else 0
        done = {job.key: nbytes_became(job, self._inplace) for job in self._all}
        compressed = sum(done.values())
        found = [MemoryEstimate(model, 0, 0, 0, needs.whole, "the model on one sample")] if self._samples else []
        one = max((packing_work(job) for job in self._all), default=0)
        gone = 0
        if self._by_data:
            activations = 0 if self._plan.on_disk else needs.activations
            hessians = needs.hessians if self._plan.hessians is None else min(needs.hessians, self._plan.hessians)
            work = needs.held + needs.floats + max(needs.block, hessians + needs.work)
            by_then = [(model, compressed)]
            if self._leaving_early and self._chains:
                by_then, gone = self._block_by_block(model, done)
            there, so_far = max(by_then, key=sum)
            found.append(MemoryEstimate(there, activations, hessians, so_far, work, "solving layers"))
        if not gone:
            found.append(MemoryEstimate(model, 0, 0, compressed, one, "packing layers"))
        if self._inplace:
            found.append(MemoryEstimate(model - gone, 0, 0, compressed, needs.whole, "comparing outputs"))
        else:
            # What is not replaced is copied.
            leaving = {job.key: linear_weight(job.module).nbytes for job in self._all if job.module in self._match}
            when = "comparing outputs" if self._samples else "copying the rest"
            rest = model - sum(leaving.values())
            found.append(MemoryEstimate(model, 0, 0, compressed + rest, needs.whole, when))
        found = [dataclasses.replace(part, model=part.model + beside) for part in found]
        training, batch = training_memory(self._model, self._learning, self._jobs, self._batches)
        if training:
            # A `Distill` step trains one of the two, a `Finetune` step a third.
            there = model + beside if self._finetunes else model
            found.append(MemoryEstimate(there, 0, 0, compressed, batch, "training", training))
        return max(found, key=lambda part: part.peak)

    def _block_by_block(self, model: int, done: dict[Any, int]) -> tuple[list[tuple[int, int]], int]:
        """Where a block's floats go when it is done: bytes of the model and of what became of layers while each block
        is solved, and then the rest; and bytes of all floats that have gone."""
        stages: dict[Any, list[Job]] = {}
        for job in self._jobs:
            stages.setdefault(self._owner.get(job.module), []).append(job)
        found: list[tuple[int, int]] = []
        so_far = gone = 0
        for stage in sorted(stages, key=lambda stage: (stage is None, stage)):
            so_far += sum(done[key] for key in {job.key for job in stages[stage]})
            found.append((model - gone, so_far))
            if stage is not None:
                leaving = [job for job in stages[stage] if job.module in self._leaving_early]
                gone += sum(linear_weight(job.module).nbytes for job in leaving)
        return found, gone

    def time(self, budget: float) -> TimeEstimate:
        """Measures, and multiplies."""
        measured = self._measured
        whole = blocks = statistics = comparing = forward = 0.0
        if self._samples:
            start = time.perf_counter()
            run(self._model, self._samples[0])
            whole = (time.perf_counter() - start) * self._parts
            share = measured.blocks_seconds / max(measured.seconds, 1e-9) if self._chains else 1.0
            blocks = whole * share
        rounds = -(-self._needs.hessians // self._plan.hessians) if self._plan.hessians else 1
        if self._by_data:
            of_block = len(measured.groups) / max(sum(map(len, self._chains)), 1) if self._chains else 1
            passes = 1 + (of_block if self._inputs == "sequential" else rounds)
            doubled = 2 if any(job.by_block or job.needs_original for job in self._jobs) else 1
            forward = blocks * passes * doubled + whole / max(self._parts, 1) * 3
            statistics = self._statistics_seconds()
        if self._samples:
            comparing = whole + blocks if not (self._inplace and self._by_data) else blocks
        solving = _solving_seconds(self._all, self._match, budget, self._by_data)
        solving += self._learning_seconds(blocks)
        training = 0.0
        if self._samples:
            first = whole / self._parts
            training = training_seconds(self._model, self._learning, self._jobs, first, self._batches)
        return TimeEstimate(forward, statistics, solving, comparing, training)

    def _statistics_seconds(self) -> float:
        wanted = {job.module for job in self._jobs if job.needs_hessian or job.needs_original}
        sizes = [
            (rows * self._parts, linear_weight(group[0]).shape[1])
            for group, rows in zip(self._measured.groups, self._measured.rows, strict=True)
            if wanted & set(group)
        ]
        if not sizes:
            return 0.0
        k = sorted(k for _, k in sizes)[len(sizes) // 2]
        x = torch.ones(512, k, device=linear_weight(self._jobs[0].module).device)
        statistics = InputStatistics(k, device=x.device)
        statistics.add(x)
        start = time.perf_counter()
        statistics.add(x)
        rate = (time.perf_counter() - start) / (len(x) * k * k)
        return sum(rows * k * k for rows, k in sizes) * rate

    def _learning_seconds(self, blocks: float) -> float:
        """AutoRound: a block forward and backward for some calls an iteration, and all calls to judge."""
        learned = [job for job in self._jobs if job.by_block]
        if not learned:
            return 0.0
        quantize = learned[0].quantize
        assert quantize is not None
        assert quantize.iterations is not None
        calls = len(self._samples)
        passes = quantize.iterations * 3 * min(_LEARNED, calls) / calls + _JUDGED
        smallest = min(learned, key=lambda job: linear_weight(job.module).numel())
        weight = linear_weight(smallest.module).detach().float()
        assert smallest.args is not None
        rounded = RoundedWeight(weight, find_grid(weight, smallest.args, "estimate", "mse"))
        start = time.perf_counter()
        rounded.move(rounded.quantized().detach(), 0.0)
        step = (time.perf_counter() - start) / max(weight.numel(), 1)
        elements = sum(linear_weight(job.module).numel() for job in learned)
        return blocks * passes + step * elements * quantize.iterations


def _solving_seconds(jobs: Sequence[Job], matches: dict[nn.Module, Match], budget: float, by_data: bool) -> float:
    """Of all layers; measured by kind and size while there is time, else in proportion to what was."""
    kinds: dict[Any, list[Job]] = {}
    for job in jobs:
        kinds.setdefault((job.algorithm, job.pruning, job.step, tuple(linear_weight(job.module).shape)), []).append(job)
    order = sorted(kinds.values(), key=lambda own: _cost(own[0]))
    measured: dict[Any, tuple[float, float]] = {}  # of the largest so far: cost and seconds, by what is done
    total, end = 0.0, time.perf_counter() + budget
    for own in order:
        job, cost = own[0], _cost(own[0])
        kind = job.algorithm, job.pruning
        known = measured.get(kind)
        if known is None or time.perf_counter() + known[1] * cost / known[0] < end:
            known = measured[kind] = cost, _solved_in(job, matches.get(job.module), by_data)
        total += len(own) * known[1] * cost / known[0]
    return total


def _solved_in(job: Job, match: Match | None, by_data: bool) -> float:
    """Seconds that it takes to solve and pack a layer; on inputs of noise, which have no say in that."""
    weight = linear_weight(job.module)
    statistics = None
    if job.needs_statistics:
        statistics = InputStatistics(weight.shape[1], job.needs_hessian, weight.device)
        generator = torch.Generator().manual_seed(0)
        statistics.add(torch.randn(_ROWS, weight.shape[1], generator=generator).to(weight.device))

    def once() -> float:
        start = time.perf_counter()
        found: Solution | None = None
        if by_data and not job.by_block and not isinstance(job.module, nn.Embedding):
            found = solve_layer(job, statistics)
        if match is not None:
            replace.compressed(match if found is None else with_solution(match, found), {})
        return time.perf_counter() - start

    first = once()  # which may have to wait for memory, and for code to be loaded
    return min(first, once()) if first < _SHORT else first


def _cost(job: Job) -> float:
    n, k = linear_weight(job.module).shape
    return float(n * k * k + k**3 if job.needs_hessian else n * k) or 1.0
