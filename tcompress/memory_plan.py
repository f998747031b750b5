"""How what steps with data hold beside the model is kept within a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from tcompress.errors import message
from tcompress.footprint import Footprint
from tcompress.layer_job import Job, Key
from tcompress.memory import in_units, nbytes_of
from tcompress.recipe import Finetune, Prune, Quantize, Recipe, Transform
from tcompress.weights import linear_weight, weight_key

#: Of a block of a chain; None of what is outside of blocks.
Stage = tuple[int, int] | None


@dataclass(frozen=True)
class Needs:
    """Bytes that solving takes beside the model, the data and what layers become.

    Attributes:
        whole: one sample through the whole model.
        block: one sample through one block.
        activations: what blocks return, and what AutoRound's are called with, of all samples.
        hessians: all of the stage that has most.
        largest: of the layer, or layers with one input, that has most.
        held: of layers that AutoRound learns together, which wait for the block's others.
        work: what solving one layer takes, at most; of AutoRound a block.
        floats: the weights of one block in floating point, before only their integers are kept.
    """

    whole: int
    block: int
    activations: int
    hessians: int
    largest: int
    held: int
    work: int
    floats: int

    def at_least(self, activations: int) -> int:
        """With one group of layers at a time."""
        collecting, solving = self.block + self.largest, 2 * self.largest + self.work
        return max(self.whole, activations + self.held + self.floats + max(collecting, solving))

    def room(self, limit: int, activations: int) -> int:
        """For Hessians, whose inverses' factors are held beside them."""
        left = limit - activations - self.held - self.floats
        return min(left - self.block, (left - self.work) // 2)


@dataclass(frozen=True)
class MemoryPlan:
    """Attributes:
    on_disk: whether activations go to files.
    hessians: bytes of Hessians at a time, or None for all of a block's.
    """

    on_disk: bool = False
    hessians: int | None = None


#: What is said of a limit to which not all steps of a recipe keep.
NOT_WITHIN = "of this recipe's steps only algorithms with data that prune and quantize keep to it"


def all_keep_within(recipe: Recipe) -> bool:
    """Whether all that a recipe does with data keeps within a limit. Transforms and training do not."""
    learning = any(isinstance(step, Transform | Finetune) for step in recipe.steps)
    return not learning and any(isinstance(step, Prune | Quantize) and step.needs_data for step in recipe.steps)


def needs_of(jobs: Sequence[Job], owner: Mapping[nn.Module, Any], measured: Footprint, samples: Sequence[Any]) -> Needs:
    """What solving these layers takes.

    Args:
        owner: the stage of each module; what is in none is outside of blocks.
        measured: of the first sample.
    """
    sizes = [nbytes_of(sample) for sample in samples]
    largest_sample = measured.scaled(max(sizes) / max(sizes[0], 1))
    parts = sum(sizes) / max(sizes[0], 1)
    returned = sum(measured.outputs) * parts
    learned = any(job.by_block for job in jobs)
    if learned or any(job.needs_original for job in jobs):
        returned *= 2
    calls = measured.calls * parts if learned else 0

    group = {weight_key(layer): number for number, group in enumerate(measured.groups) for layer in group}
    stages: dict[Stage, list[Job]] = {}
    for job in jobs:
        stages.setdefault(owner.get(job.module), []).append(job)
    by_stage = {stage: _hessians(own, group) for stage, own in stages.items()}
    together = [sum(_hessians([j for j in own if j.by_block], group).values()) for own in stages.values()]
    single = [size for found in by_stage.values() for size in found.values()]
    outside = any(stage is None for stage in stages)
    return Needs(
        whole=largest_sample.whole,
        block=largest_sample.whole if outside else largest_sample.block,
        activations=int(returned + calls),
        hessians=max((sum(found.values()) for found in by_stage.values()), default=0),
        largest=max(single, default=0),
        held=max(together, default=0),
        work=max(max((work_of(job) for job in jobs), default=0), _learning(stages, largest_sample)),
        # Outside of blocks nothing runs again with what was found: only pruned weights wait there, to be written.
        floats=max(
            (
                sum(4 * _numel(job) for job in own if stage is not None or job.only_prunes)
                for stage, own in stages.items()
            ),
            default=0,
        ),
    )


def plan(limit: int | None, needs: Needs) -> MemoryPlan:
    """Everything in memory, if it fits; else activations in files, and as many Hessians at a time as fit.

    Raises:
        ValueError: one layer at a time is too much already.
    """
    if limit is None:
        return MemoryPlan()
    if needs.room(limit, needs.activations) >= needs.hessians and needs.at_least(needs.activations) <= limit:
        return MemoryPlan()
    least = needs.at_least(0)
    if limit < least:
        parts = {
            "the model on one sample": needs.whole,
            "a block on one sample": needs.block,
            "the Hessian of one layer": needs.largest,
            "solving it": needs.work,
            "a block's weights": needs.floats,
        }
        why = ", ".join(f"{what} takes {in_units(size)}" for what, size in parts.items())
        hint = f"{why}; shorter samples take less"
        raise ValueError(message("compress", "max_memory", in_units(limit), f"at least {in_units(least)}", hint))
    return MemoryPlan(on_disk=True, hessians=needs.room(limit, 0))


def work_of(job: Job) -> int:
    """Bytes that solving a layer takes beside its weight, its Hessian and the factor of that, about: some matrices of
    the weight's shape, and for a factor two in float64 and one in float32 of the Hessian's."""
    k = linear_weight(job.module).shape[1]
    matrices = 12 if job.algorithm in ("gptq", "hqq") else 8
    return matrices * 4 * _numel(job) + (20 * k * k if job.needs_hessian else 0)


def _learning(stages: Mapping[Stage, Sequence[Job]], measured: Footprint) -> int:
    """AutoRound has seven matrices of each weight's shape, and what a block keeps for its gradients."""
    learned = [sum(28 * _numel(job) for job in own if job.by_block) for own in stages.values()]
    most = max(learned, default=0)
    return most + 3 * measured.block if most else 0


def _hessians(jobs: Sequence[Job], group: Mapping[Key, int]) -> dict[int, int]:
    """Bytes of the Hessians of layers, by the group that shares one."""
    found: dict[int, int] = {}
    for job in jobs:
        if job.needs_hessian or job.needs_original:
            k = linear_weight(job.module).shape[1]
            number = group.get(job.key, -1 - len(found))
            found[number] = max(found.get(number, 0), 4 * k * k * (2 if job.needs_original else 1))
    return found


def _numel(job: Job) -> int:
    return linear_weight(job.module).numel()
