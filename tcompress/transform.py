"""The steps of a recipe that turn a model into another one in floating point, run one after the other on a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tcompress import calibrate
from tcompress.errors import message
from tcompress.recipe import Distill, Finetune, Prune, Recipe, Transform
from tcompress.replace import copied_model
from tcompress.report.report import LayerReport
from tcompress.resume import fingerprint
from tcompress.swap_layers import swap_layers
from tcompress.transform_store import TransformStore


@dataclass
class Work:
    """A model under way through a recipe's transforms.

    Attributes:
        model: a copy, which a transform changes in place: module by module, never the module that it is itself.
        original: the model as it was given; nothing may change it.
        recipe: the whole recipe.
        samples: the data as a list of batches, read once, or None where none were given.
        notes: what to warn of; a transform adds what it left alone and why.
        layers: what the report says of each module that was changed.
        progress: whether to show progress on a terminal.
        reference: the first batch and the model's output on it, before any change; None without data.
    """

    model: nn.Module
    original: nn.Module
    recipe: Recipe
    samples: list[Any] | None
    notes: list[str] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    progress: bool = False
    reference: calibrate.Reference | None = None

    def data(self, step: Transform, why: str) -> list[Any]:
        """The samples of a step that cannot do without; `why` ends the error's text.

        Raises:
            ValueError: there are none.
        """
        if self.samples is None:
            raise ValueError(message("compress", "data", "none", "calibration samples", f"{step.step}: {why}"))
        return self.samples if isinstance(step, Distill) else self.samples[: self.recipe.samples]


S = TypeVar("S", bound=Transform)
_RUN: dict[type[Transform], Callable[[Work, Any], None]] = {}


def transforms(kind: type[S]) -> Callable[[Callable[[Work, S], None]], Callable[[Work, S], None]]:
    """Declares the function that runs a kind of step. Its module is imported by `tcompress.compress`."""

    def declare(run: Callable[[Work, S], None]) -> Callable[[Work, S], None]:
        _RUN[kind] = run
        return run

    return declare


def has_transforms(recipe: Recipe) -> bool:
    """Whether a recipe has any."""
    return any(isinstance(step, Transform) for step in recipe.steps)


def transform(
    model: nn.Module,
    recipe: Recipe,
    data: Any,
    inplace: bool = False,
    progress: bool = False,
    resume: str | Path | None = None,
) -> tuple[Work, Recipe | None]:
    """Runs the transforms of a recipe in its order. Before a `Distill` step the `Prune` steps that stand before it are
    run too, by whatever algorithm: it trains the model that they leave.

    Args:
        data: as for `compress`.
        inplace: change `model` itself instead of a copy.
        resume: a folder that keeps the model after each transform; those that it has are not run again.

    Returns:
        The work done, with the new model, and the recipe of the other steps, None where there are no others.

    Raises:
        ValueError: what the steps raise, a model that cannot be copied, or a folder of another run. With `inplace` the
            model may then be changed in part.
    """
    samples = None if data is None else list(calibrate.batches(data))
    teaches = any(isinstance(step, Distill | Finetune) for step in recipe.steps)
    hint = "distill needs the original beside it; make its weights plain (remove_weight_norm, …) first"
    original = copied_model(model, hint=hint) if inplace and teaches else model
    work = Work(model if inplace else copied_model(model), original, recipe, samples, progress=progress)
    if samples is not None:
        with calibrate.evaluating(model):
            work.reference = calibrate.reference(model, samples[0])
    store, finished = None, None
    steps = [step for step in recipe.steps if isinstance(step, Transform)]
    if resume is not None:
        store = TransformStore(resume, fingerprint(model, recipe, samples or []), work.model)
        finished = store.last(len(steps))
    done: list[Any] = []
    for number, step in enumerate(steps):
        prunes = _prunes_before(recipe, step, done) if isinstance(step, Distill) else []
        if finished is None or number > finished:
            _prune(work, prunes)
            _RUN[type(step)](work, step)
            if store is not None:
                store.save(number, work.model, work.notes, work.layers)
        elif store is not None and number == finished:
            work.notes, work.layers = store.load(number, work.model)
        done += [*prunes, step]
    return work, rest_of(recipe, done)


def _prunes_before(recipe: Recipe, distill: Distill, done: Sequence[Any]) -> list[Prune]:
    """The pruning steps that stand before a step and were not run yet."""
    place = next(i for i, step in enumerate(recipe.steps) if step is distill)
    return [s for s in recipe.steps[:place] if isinstance(s, Prune) and not any(s is other for other in done)]


def _prune(work: Work, prunes: Sequence[Prune]) -> None:
    if prunes:
        alone = next(work.model.children(), None) is None  # a single layer cannot be replaced in its own place
        recipe = work.recipe.model_copy(update={"steps": tuple(prunes)})
        swapped = swap_layers(work.model, recipe, work.samples, not alone, work.progress, required=False)
        work.model = swapped.model
        work.layers += swapped.layers
        work.notes += swapped.notes


def rest_of(recipe: Recipe, done: Sequence[Any]) -> Recipe | None:
    """The recipe without some of its steps, or None where no step is left."""
    steps = tuple(step for step in recipe.steps if not any(step is other for other in done))
    return recipe.model_copy(update={"steps": steps}) if steps else None
