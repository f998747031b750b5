"""What is known of a run of `compress` before it: the largest of its parts, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcompress import replace
from tcompress.block_places import Place, find_places
from tcompress.calibrate import run
from tcompress.distances import PIECE
from tcompress.expected_training import learning_steps, training_memory, training_seconds
from tcompress.footprint import Footprint, measure
from tcompress.in_place import with_solution
from tcompress.layer_job import Job, Solution
from tcompress.match import Match
from tcompress.memory import nbytes_of
from tcompress.memory_plan import MemoryPlan, Needs, needs_of, plan
from tcompress.quantize.autoround import RoundedWeight
from tcompress.quantize.range_search import find_grid
from tcompress.quantize.scheme import Scheme
from tcompress.recipe import Quantize, Recipe
from tcompress.report.size import model_sizes
from tcompress.solve_layer import solve_layer
from tcompress.statistics import InputStatistics
from tcompress.weights import linear_weight

#: Calls that AutoRound learns by in an iteration, and times that it judges all of them.
_LEARNED, _JUDGED = 4, 11
#: Inputs by which a layer is solved to see how long it takes.
_ROWS = 256


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes at the peak of a run.

    Attributes:
        model: parameters and buffers, as far as they are still there.
        activations: what blocks return for all samples.
        hessians: of layers' inputs.
        compressed: what layers became by then.
        work: one sample on its way through a block or the model, and what solving a layer takes.
        training: a copy that is trained, with its gradients and its optimizer.
        when: in which part of the run that is.
    """

    model: int
    activations: int
    hessians: int
    compressed: int
    work: int
    when: str
    training: int = 0

    @property
    def peak(self) -> int:
        return self.model + self.activations + self.hessians + self.compressed + self.work + self.training


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
        done = {job.key: _nbytes_became(job, self._inplace) for job in self._all}
        compressed = sum(done.values())
        leaving = {job.key: linear_weight(job.module).nbytes for job in self._all if job.module in self._match}
        kept = model - sum(leaving.values()) if self._inplace else model
        found = [MemoryEstimate(model, 0, 0, 0, needs.whole, "the model on one sample")] if self._samples else []
        one = max((_packing_work(job) for job in self._all), default=0)
        found.append(MemoryEstimate(model, 0, 0, compressed, one, "packing layers"))
        if self._by_data:
            activations = 0 if self._plan.on_disk else needs.activations
            hessians = needs.hessians if self._plan.hessians is None else min(needs.hessians, self._plan.hessians)
            work = needs.held + needs.floats + max(needs.block, hessians + needs.work)
            # In place a block's floats go when it is done: there is most at the first.
            so_far = max(self._of_stages(done), default=0) if self._inplace and self._chains else compressed
            found.append(MemoryEstimate(model, activations, hessians, so_far, work, "solving layers"))
            if self._inplace:
                found = [part for part in found if part.when != "packing layers" or not self._chains]
        if not self._inplace:
            # What is not replaced is copied.
            rest = model - sum(leaving.values())
            when = "comparing outputs" if self._samples else "copying the rest"
            found.append(MemoryEstimate(model, 0, 0, compressed + rest, needs.whole, when))
        else:
            found.append(MemoryEstimate(kept, 0, 0, compressed, needs.whole, "comparing outputs"))
        training, batch = training_memory(self._model, self._learning, self._jobs, self._batches)
        if training:
            found.append(MemoryEstimate(model, 0, 0, compressed, batch, "training", training))
        return max(found, key=lambda part: part.peak)

    def _of_stages(self, done: dict[Any, int]) -> list[int]:
        stages: dict[Any, int] = {}
        for job in self._jobs:
            stage = self._owner.get(job.module)
            stages[stage] = stages.get(stage, 0) + done[job.key]
        return list(stages.values())

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
        training = training_seconds(self._learning, whole / self._parts, self._batches) if self._samples else 0.0
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
    start = time.perf_counter()
    found: Solution | None = None
    if by_data and not job.by_block and not isinstance(job.module, nn.Embedding):
        found = solve_layer(job, statistics)
    if match is not None:
        replace.compressed(match if found is None else with_solution(match, found), {})
    return time.perf_counter() - start


def _cost(job: Job) -> float:
    n, k = linear_weight(job.module).shape
    return float(n * k * k + k**3 if job.needs_hessian else n * k) or 1.0


def _nbytes_became(job: Job, inplace: bool) -> int:
    """Bytes of what a layer becomes."""
    weight = linear_weight(job.module)
    scheme: Scheme | None = None if job.step is None else job.step.scheme
    density = 1.0 if job.pruned is None or isinstance(job.step, Quantize) else 1 - job.pruned.zeros
    if job.step is None:
        return 0 if inplace and job.pruned is not None and job.pruned.step.needs_data else weight.nbytes
    indices = 0 if isinstance(job.step, Quantize) else weight.numel() // 8
    if scheme is None:
        return int(weight.nbytes * density) + indices
    args = scheme.weights
    groups = weight.shape[0] * -(-weight.shape[1] // (args.group_size or max(weight.shape[1], 1)))
    stored = weight.numel() * (1 if args.bits > 4 else 0.5)
    return int(stored * density) + indices + groups * (3 if args.bits <= 4 else 4)


def _packing_work(job: Job) -> int:
    """Bytes that rounding takes beside a weight, or comparing it with what is stored, in float64."""
    numel = linear_weight(job.module).numel()
    return max(16 * numel, 4 * numel + 4 * 8 * min(numel, PIECE))
