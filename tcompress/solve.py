"""Finds the weights of all layers of a recipe that algorithms with calibration data have a part in, block by block."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from tcompress.block_places import find_places
from tcompress.blocks import BlockRunner, forward_replaced
from tcompress.calibrate import batches, evaluating
from tcompress.collect import collect, layers_by_input
from tcompress.distances import sqnr_db, squared_errors
from tcompress.errors import message
from tcompress.footprint import measure
from tcompress.in_place import InPlace
from tcompress.layer_job import Job, Key, Solution, Written, jobs_of
from tcompress.layer_progress import LayerProgress, layer_progress
from tcompress.match import Match
from tcompress.match_attention import holding
from tcompress.memory import trim
from tcompress.memory_plan import MemoryPlan, needs_of, plan
from tcompress.prune_step import Pruned
from tcompress.recipe import Prune, Quantize, Recipe
from tcompress.resume import StageStore, fingerprint
from tcompress.solve_block import Calls, solve_block
from tcompress.solve_layer import solve_layer, stand_in
from tcompress.stage_tensors import from_tensors, to_tensors
from tcompress.statistics import InputStatistics, output_sqnr_db
from tcompress.weights import linear_weight


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
    resume: str | Path | None = None,
    inplace: bool = False,
    max_memory: int | None = None,
    early: InPlace | None = None,
) -> tuple[dict[nn.Module, Solution], list[Any], list[str]]:
    """Solves the linear layers of a recipe in the order in which the model runs them.

    Block by block (`blocks.find_chains`): the inputs of a block's layers are collected while the block runs as it is,
    all its layers are solved, and it runs again with their new weights to give the next block its inputs. So each
    block makes up for the errors of the ones before, as in GPTQ, section 4. `Recipe.inputs` "sequential" goes on
    within a block: layers with one input are solved, and the block runs again for those after them. With "original"
    all inputs are those of the model as it is. Layers that AutoRound solves come last in their block, together.
    Layers outside of blocks come last. At any time one block's Hessians are in memory, one for layers with one input,
    and what one block returned for the data, for AutoRound also what it returned in the original model. Where there are
    no blocks, all layers are solved after one pass over the model as it is. Weights are replaced, activations are not
    quantized meanwhile. The model is left as it was, unless `inplace` is wanted.

    A layer's input tokens with NaN or infinity are left out (`InputStatistics`). A layer that is never called is pruned
    by magnitude and rounded to nearest. Both are reported.

    Args:
        matches, pruned, converted: as found in the model for the recipe.
        data: batches, clean (`Samples`).
        inplace: layers that are pruned, and that no later step packs, get their new weights as soon as their block is
            done: there is never a second copy of the model.
        resume: a folder that keeps what each block's layers became; blocks that it has already are not solved again.
        max_memory: bytes to keep within (`memory_plan`).
        early: puts layers in their places as soon as their block is done; only where `placed_at_once` says so.

    Returns:
        Solutions by module; the samples that were used; what there is to report.

    Raises:
        ValueError: no data where a step needs them, or none that can be used; a folder of another run; or what the
            algorithms raise, with the layer's name.
    """
    steps = steps_with_data(recipe)
    if data is None:
        step = steps[0]
        by = step.algorithm if step.algorithm not in ("rtn", "hqq") else "bias_correction or outliers"
        needs = f"{step.step}: {by} decides by the inputs of layers"
        raise ValueError(message("compress", "data", "none", "calibration samples", needs))
    notes: list[str] = []
    samples = list(batches(data))
    jobs = jobs_of(matches, pruned)
    store = None if resume is None else StageStore(resume, fingerprint(model, recipe, samples))
    with evaluating(model), ExitStack() as stack:
        stack.enter_context(holding(model, converted))
        for module in converted.values():
            stack.enter_context(evaluating(module))
        places = find_places(model, samples[0], [job.module for job in jobs])
        chains, owner = places.chains, places.owner
        if not chains and len(jobs) > 1:
            notes.append(f"{places.why}: all layers were solved on the original model's inputs")
        within, folder = MemoryPlan(), None
        if max_memory is not None and jobs:
            measured = measure(model, chains, samples[0], [job.module for job in jobs])
            within = plan(max_memory, needs_of(jobs, owner, measured, samples))
        if within.on_disk:
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="tcompress-")))
        bar = stack.enter_context(layer_progress(len(jobs), progress))
        run = _Run(
            model, chains, samples, jobs, recipe.inputs, notes, store, inplace, folder, within.hessians, early, bar
        )
        for stage in [(c, b) for c, chain in enumerate(chains) for b in range(len(chain))]:
            run.block(*stage, [job for job in jobs if owner.get(job.module) == stage])
        run.rest([job for job in jobs if job.module not in owner])
    notes += _without_bias(jobs)
    return {job.module: run.solved[job.key] for job in jobs}, samples, notes


class _Run:
    """The way through a model's blocks.

    Attributes:
        solved: what was found so far; of a quantized layer only the integers, of which the floats come again.
    """

    def __init__(
        self,
        model: nn.Module,
        chains: list[list[nn.Module]],
        samples: list[Any],
        jobs: Sequence[Job],
        inputs: str,
        notes: list[str],
        store: StageStore | None,
        inplace: bool,
        folder: Path | None = None,
        limit: int | None = None,
        early: InPlace | None = None,
        bar: LayerProgress | None = None,
    ) -> None:
        self._inplace = inplace
        self._bar = LayerProgress(None, len(jobs)) if bar is None else bar
        self._names = {module: name for name, module in model.named_modules()}
        self._folder, self._limit, self._early = folder, limit, early
        self._output_sqnr: dict[Key, float] = {}
        self.solved: dict[Key, Solution] = {}
        self._chains, self._inputs, self._notes, self._store = chains, inputs, notes, store
        self._runner = BlockRunner(model, chains, samples, folder)
        #: What the original blocks return: what AutoRound's are to return as well, and what propagated weights make up
        #: for.
        self._original: BlockRunner | None = None
        if any(job.by_block or job.needs_original for job in jobs):
            self._original = self._runner if inputs == "original" else BlockRunner(model, chains, samples, folder)

    def block(self, chain: int, block: int, jobs: list[Job]) -> None:
        """Solves the layers of one block and gives the next one its inputs."""
        module = self._chains[chain][block]
        original = self._inputs == "original"
        stage, noted = f"{chain}-{block}", len(self._notes)
        if self._restored(stage, jobs):
            self._go_on(chain, block)
            with ExitStack() as replaced:
                if not original:
                    for job in jobs:
                        self._replace(replaced, job)
                self._run_on(chain, block, jobs)
            self._bar.done(jobs, self._names[module], kept=True)
            self._done_with(jobs)
            return
        together = [job for job in jobs if job.by_block]
        groups = self._groups(chain, block, jobs)
        for_together: dict[Key, InputStatistics] = {}
        with ExitStack() as replaced:
            for parts in groups:
                alone = [job for part in parts for job in part if not job.by_block]
                for_together |= self._solve_parts(chain, block, parts, alone)
                if parts is groups[0]:  # until here nothing is replaced in this block
                    self._go_on(chain, block)
                self._solve(alone, {})
                if not original:
                    for job in alone:
                        self._replace(replaced, job)
            if together:
                assert self._original is not None
                calls = Calls(self._folder)
                hook = module.register_forward_pre_hook(calls.hook, with_kwargs=True)
                try:
                    self._runner.run(chain, block, original)
                finally:
                    hook.remove()
                targets = self._original.outputs(chain)
                learned, *losses = solve_block(module, together, for_together, calls, targets)
                self.solved |= learned
                self._bar.learned(*losses)
                if not original:
                    for job in together:
                        self._replace(replaced, job)
            if not (original and together):
                self._run_on(chain, block, jobs)
        self._keep(stage, jobs, noted)
        self._bar.done(jobs, self._names[module])
        self._done_with(jobs)

    def _run_on(self, chain: int, block: int, jobs: list[Job]) -> None:
        """Gives the next block its inputs."""
        with nullcontext() if self._early is None else self._early.compared(jobs, self.solved):
            self._runner.run(chain, block, keep=True)

    def _done_with(self, jobs: list[Job]) -> None:
        """What a block's layers need no more goes."""
        self._forget_copies(jobs)
        if self._early is not None:
            self._early.put()
            for job in jobs:
                if job.module in self._early.replaced:
                    self.solved[job.key] = Solution(self.solved[job.key].weight.new_empty(0), None, None)

    def _solve_parts(
        self, chain: int, block: int, parts: list[list[Job]], alone: list[Job]
    ) -> dict[Key, InputStatistics]:
        """Solves layers of a block on their own. Returns the statistics of the others."""
        others: dict[Key, InputStatistics] = {}
        wait = {job.key for part in parts for job in part if job.by_block}
        run = partial(self._runner.run, chain, block, False)
        for statistics in self._statistics(parts, run, partial(self._pairs, chain, block)):
            others |= {key: found for key, found in statistics.items() if key in wait}
            self._solve([job for job in alone if job.key in statistics], statistics)
        return others

    def _go_on(self, chain: int, block: int) -> None:
        """Keeps what the original block returns."""
        if self._original is not None and self._original is not self._runner:
            self._original.run(chain, block, keep=True)

    def rest(self, jobs: list[Job]) -> None:
        """Solves the layers outside of blocks."""
        noted = len(self._notes)
        if self._restored("rest", jobs):
            self._forget_copies(jobs)
            self._bar.done(jobs, "outside of blocks", kept=True)
            return
        for job in jobs:
            if job.by_block:
                by = "gptq" if job.needs_hessian else "rtn"
                self._notes.append(f"{job.name} stands in no block, by which autoround learns: {by} instead")
        if jobs:
            for statistics in self._statistics([[job] for job in jobs], self._runner.run_rest):
                own = [job for job in jobs if job.key in statistics]
                self._solve(own, statistics)
                self._forget_copies([job for job in own if not job.only_prunes])
            self._solve(jobs, {})
            self._keep("rest", jobs, noted)
            self._bar.done(jobs, "outside of blocks" if self._chains else "all layers")
            self._forget_copies(jobs)

    def _written(self, job: Job, found: Solution) -> Solution:
        weight = linear_weight(job.module)
        sqnr = sqnr_db(*squared_errors(weight, found.weight))
        with torch.no_grad():
            weight.copy_(found.weight)
        known = Written(sqnr, self._output_sqnr.get(job.key))
        return Solution(found.weight.new_empty(0), None, None, written=known)

    def _restored(self, stage: str, jobs: list[Job]) -> bool:
        """Takes a stage's solutions from an earlier run, if it has been finished there."""
        found = None if self._store is None else self._store.load(stage)
        if found is None:
            return False
        tensors, info = found
        device = {job.name: linear_weight(job.module).device for job in jobs}
        solutions = from_tensors(tensors, info["layers"], device)
        self.solved |= {job.key: solutions[job.name] for job in jobs if job.name in solutions}
        self._notes += info["notes"]
        self._output_sqnr |= {job.key: info["errors"][job.name] for job in jobs if job.name in info["errors"]}
        return True

    def _keep(self, stage: str, jobs: list[Job], noted: int) -> None:
        if self._store is not None:
            by_key = {job.key: job.name for job in reversed(jobs)}
            tensors, layers = to_tensors({name: self.solved[key] for key, name in by_key.items()})
            errors = {name: self._output_sqnr[key] for key, name in by_key.items() if key in self._output_sqnr}
            self._store.save(stage, tensors, {"layers": layers, "notes": self._notes[noted:], "errors": errors})

    def _groups(self, chain: int, block: int, jobs: list[Job]) -> list[list[list[Job]]]:
        """Layers that are solved before the next ones are run; in each of these, those with one input together."""
        if not any(job.needs_statistics for job in jobs):
            return [[[job] for job in jobs]]
        of = {job.module: job for job in jobs}
        found = layers_by_input(list(of), partial(self._runner.run, chain, block, False, 0))
        parts = [[of[module] for module in part] for part in found]
        return [[part] for part in parts] if self._inputs == "sequential" else [parts]

    def _statistics(
        self, parts: list[list[Job]], run: Callable[[], None], pairs: Callable[[], Any] | None = None
    ) -> Iterator[dict[Key, InputStatistics]]:
        """Of as many layers at a time as fit."""
        jobs = [job for part in parts for job in part]
        layers = [[job.module for job in part if job.needs_statistics] for part in parts]
        hessian = {job.key for part in parts if any(job.needs_hessian for job in part) for job in part}
        paired = self._original is not self._runner and any(job.needs_original for job in jobs)
        return collect(layers, run, hessian, pairs() if pairs is not None and paired else None, self._limit)

    def _pairs(self, chain: int, block: int) -> list[tuple[Callable[[], None], Callable[[], None]]]:
        """Of each sample, a call of the block in the original model and one in the compressed model."""
        assert self._original is not None
        return [
            (
                partial(self._original.run, chain, block, False, i),
                partial(self._runner.run, chain, block, False, i),
            )
            for i in range(len(self._runner.batches))
        ]

    def _replace(self, stack: ExitStack, job: Job) -> None:
        stack.enter_context(forward_replaced(job.module, stand_in(job.module, self.solved[job.key]).forward))

    def _solve(self, jobs: Sequence[Job], statistics: Mapping[Key, InputStatistics]) -> None:
        for job in jobs:
            if job.key in self.solved:
                continue
            found = statistics.get(job.key)
            if found is not None and found.left_out:
                total = found.count + found.left_out
                self._notes.append(f"{job.name}: {found.left_out} of {total} input tokens left out: NaN or infinity")
            if found is not None and found.count == 0:
                text = f"{job.name} has no calibration inputs: by magnitude and rounding to nearest instead"
                self._notes.append(text)
                found = None
            trim()
            try:
                self.solved[job.key] = solve_layer(job, found)
            except ValueError as error:
                raise ValueError(f"compress: {job.name}: {error}") from error
            written, sqnr = self._inplace and job.only_prunes, None
            if (written or self._bar.shown) and found is not None and found.hessian is not None:
                before, after = linear_weight(job.module).detach(), self.solved[job.key].weight
                sqnr = output_sqnr_db(before, after, found.hessian)
                if written:
                    self._output_sqnr[job.key] = sqnr
            self._bar.solved(job.name, sqnr)

    def _forget_copies(self, jobs: Collection[Job]) -> None:
        """Of quantized layers the integers are enough, of pruned ones the weight; in place, these need nothing more."""
        for job in jobs:
            found = self.solved[job.key]
            if self._inplace and job.only_prunes and found.written is None:
                self.solved[job.key] = self._written(job, found)
            elif found.outliers is None and found.written is None:  # what pruning left has its zeros
                weight = found.weight if found.packed is None else found.weight.new_empty(0)
                self.solved[job.key] = Solution(weight, None, found.packed, found.bias)


def _without_bias(jobs: Sequence[Job]) -> list[str]:
    wanting = [job for job in jobs if job.quantize is not None and job.quantize.bias_correction]
    lacking = [job for job in wanting if getattr(job.module, "bias", None) is None]
    return [f"{len(lacking)} of {len(wanting)} layers have no bias to correct"] if lacking else []
