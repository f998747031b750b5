"""The front door: a model and a recipe in, the compressed model and a report out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import get_console
from torch import nn

from tcompress import awq_step, calibrate, distill_step, rotate_step, smooth_step  # noqa: F401  transforms register
from tcompress.errors import CompressionWarning, message
from tcompress.estimate import estimate
from tcompress.finetune_step import finetune_step
from tcompress.memory import parse_bytes, trim, trimmed_between_blocks
from tcompress.memory_plan import NOT_WITHIN, all_keep_within
from tcompress.prune import shrink  # noqa: F401  declares its step
from tcompress.recipe import Codebook, LowRank, Recipe, Share, Shrink
from tcompress.report.report import Report
from tcompress.report.size import Sizes, model_sizes
from tcompress.samples import Samples
from tcompress.share import codebook_step, low_rank_step, tie  # noqa: F401  declare their steps
from tcompress.solve import steps_with_data
from tcompress.swap_layers import Swapped, swap_layers
from tcompress.transform import Work, has_transforms, transform
from tcompress.transform_store import LAYERS

#: Samples from which on an estimate, which runs the model on one of them three times, is small beside the run.
_WORTH_AN_ESTIMATE = 8


@dataclass(frozen=True)
class CompressResult:
    """The compressed model, and the report on what was done and what it cost."""

    model: nn.Module
    report: Report

    def __repr__(self) -> str:
        return f"CompressResult({type(self.model).__name__}, {self.report.counts})"


@torch.inference_mode(False)  # of its tensors no model could be trained, or compiled, later
def compress(
    model: nn.Module,
    recipe: str | Path | dict[str, Any] | Recipe = "int8",
    data: Any = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    resume: str | Path | None = None,
    inplace: bool = False,
    max_memory: int | str | None = None,
    progress: bool = True,
) -> CompressResult:
    """Replaces the modules that a recipe targets by compressed ones.

    Args:
        model: any module. A module that stands at several places is replaced once, at all of them.
        recipe: a preset's name ("int8"), a `Recipe`, a dict, or the path of a YAML file.
        data: samples, on which each layer's output is compared with its replacement's for the report, and by which
            attention that would lose too much (`Quantize.min_cosine`) stays in floating point. Optional, unless an
            algorithm of the recipe decides by them (gptq, autoround, wanda, … ; `solve` says how). A tensor, a mapping
            (keywords) or a tuple (arguments) is one batch; a DataLoader or list yields several; text needs `tokenizer`.
            Samples that are empty or hold NaN or infinity are left out, with a warning (`Samples`).
        tokenizer: of text in the data, called as those of `transformers` are.
        max_length: token ids are clipped to as many; by default to the positions that the model's configuration names.
        resume: a folder, made if it is missing, that keeps what algorithms with data (gptq, sparsegpt, …) found block
            by block. The same call with the same folder after a crash goes on after the last block that was finished,
            with the result that it would have had. So does it after the last transform (smooth, awq, rotate, shrink, …)
            that was finished, whose model is kept there; within a step that trains, its `checkpoint` does.
        inplace: change `model` itself, block by block where algorithms with data prune or quantize it: there is then no
            second copy of it, the floats of a block go as soon as it is done, and a run that fails may leave it
            compressed in part. Layers of blocks are then compared on what they are given in the model under way.
            Otherwise `model` stays as it is, and what is not compressed is copied.
        max_memory: bytes, or text such as "700 MB": the most that algorithms with data (gptq, sparsegpt, …) hold beside
            the model, the data and what the layers become: activations, Hessians, a layer's work, and one sample's way
            through the model. What blocks return goes to files where it does not fit, in a folder that is removed at
            the end (of the system's for temporary files: TMPDIR), and the Hessians of a block are collected one after
            the other; the result is the same, and takes longer. The sizes are measured on the first sample and
            otherwise counted, so that a process may hold a little more. `tcompress.estimate` says what is needed.
        progress: show a progress bar on a terminal, and before it, with enough data, what the run is expected to take.

    Returns:
        The model, with the same training flag and call signature, and the report.

    Raises:
        TypeError: `model` is no module, or an argument has an unusable type.
        ValueError: the recipe matches nothing, the model is compressed already, a weight holds NaN or infinity, or
            `inplace` for a model that is a single layer, or the recipe needs `data` and none are given that can be
            used, or `max_memory` is too little for one layer. `model` is then unchanged, but in place, where the steps
            before the one that failed may be done.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("compress", "model", type(model).__name__, "a torch.nn.Module"))
    recipe = Recipe.load(recipe)
    before = model_sizes(model)
    samples = None if data is None else Samples(data, model, tokenizer, max_length)
    limit = None if max_memory is None else parse_bytes(max_memory, "max_memory")
    show = progress and get_console().is_terminal
    data = samples
    if show and samples is not None and steps_with_data(recipe) and not has_transforms(recipe):
        data = list(samples)
        if len(data) >= _WORTH_AN_ESTIMATE:
            expected = estimate(model, recipe, data, inplace=inplace, max_memory=limit, seconds=0)
            get_console().print(expected.line, highlight=False)
    work: Work | None = None
    if has_transforms(recipe):
        work, swapped = _transformed(model, recipe, data, inplace, show, resume, limit)
    else:
        swapped = swap_layers(model, recipe, data, inplace, show, resume=resume, max_memory=limit)
    layers, notes = swapped.layers, swapped.notes
    reference = swapped.reference
    if work is not None:
        layers, notes, reference = [*work.layers, *layers], [*work.notes, *notes], work.reference
    cosine = None if reference is None else _output_cosine(swapped.model, reference, notes)
    if samples is not None:
        notes = [*samples.notes, *notes]
    keeps = steps_with_data(recipe) or has_transforms(recipe) or finetune_step(recipe) is not None
    if resume is not None and not keeps:
        notes.append("resume: no step of this recipe keeps what it has finished there")
    if limit is not None and not all_keep_within(recipe):
        notes.append(f"max_memory: {NOT_WITHIN}")
    after = model_sizes(swapped.model)
    if swapped.smaller_is_meant:
        notes += _size_notes(before, after)
    report = Report(
        recipe=recipe,
        layers=tuple(layers),
        attention=tuple(swapped.attention),
        before=before,
        after=after,
        output_cosine=cosine,
        warnings=tuple(notes),
    )
    for note in notes:
        warnings.warn(f"compress: {note}", CompressionWarning, stacklevel=3)  # one is the decorator's
    return CompressResult(swapped.model, report)


def _transformed(
    model: nn.Module,
    recipe: Recipe,
    data: Any,
    inplace: bool,
    progress: bool,
    resume: str | Path | None,
    max_memory: int | None,
) -> tuple[Work, Swapped]:
    """The transforms of a recipe, then its other steps on what they made."""
    work, rest = transform(model, recipe, data, inplace, progress, resume)
    if rest is None:
        return work, Swapped(work.model, [], [], [], None, _makes_smaller(recipe))
    # The copy may be changed; a model that is a single layer cannot be.
    in_copy = inplace or next(work.model.children(), None) is not None
    required = not work.layers
    of_layers = None if resume is None else Path(resume) / LAYERS
    swapped = swap_layers(
        work.model,
        rest,
        work.samples,
        in_copy,
        progress,
        required=required,
        resume=of_layers,
        max_memory=max_memory,
        original=work.original,
    )
    return work, replace(swapped, smaller_is_meant=swapped.smaller_is_meant or _makes_smaller(recipe))


def _makes_smaller(recipe: Recipe) -> bool:
    """Whether a transform of the recipe is there for the size."""
    return any(isinstance(step, Codebook | LowRank | Share | Shrink) for step in recipe.steps)


def _output_cosine(model: nn.Module, before: calibrate.Reference, notes: list[str]) -> float | None:
    """Cosine of the whole model's output on the first batch to what it was."""
    trim()
    with calibrate.evaluating(model), trimmed_between_blocks(model):
        after = calibrate.first_tensor(calibrate.run(model, before.batch))
    if after is None or after.shape != before.shape:
        notes.append("the compressed model's output has another shape")
        return None
    if not before.finite:
        notes.append("the model's output is not finite on the data, before compression already")
        return None
    if not before.is_finite(after):
        notes.append("the compressed model's output holds NaN or infinity where the model's does not")
        return None
    return before.cosine_to(after)


def _size_notes(before: Sizes, after: Sizes) -> list[str]:
    if after.disk >= before.disk:
        return [f"the model did not get smaller: {before.disk} bytes before, {after.disk} after"]
    return []
