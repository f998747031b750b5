"""Distillation: a student learns to give what its teacher gives, or a compressed model what it gave before."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from rich import get_console
from torch import nn

from tcompress.calibrate import evaluating
from tcompress.distill.admm import AdmmPruning
from tcompress.distill.batches import Batches
from tcompress.distill.constraint import Constraint, FixedZeros, layers_with_zeros
from tcompress.distill.distiller import Distiller
from tcompress.distill.effective import Effective, computing_with
from tcompress.distill.fake_quantize import simulated
from tcompress.distill.gradual import GradualPruning
from tcompress.distill.modes import digest, gradients, training_modes
from tcompress.distill.movement import MovementPruning
from tcompress.distill.trainer import History, check_accelerate, train
from tcompress.errors import CompressionWarning, message
from tcompress.match import COMPRESSED, any_matches, module_names, output_embeddings
from tcompress.prune_step import prune_masks
from tcompress.recipe import Distill, Prune, Recipe
from tcompress.recipe.training_prune import TrainingPrune
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.resume import digest_of
from tcompress.transform import Work, transforms

_METHODS: dict[str, type[Constraint]] = {
    "magnitude": GradualPruning,
    "movement": MovementPruning,
    "admm": AdmmPruning,
}


@dataclass(frozen=True)
class DistillResult:
    """What `distill` did.

    Attributes:
        model: the student itself, trained.
        history: losses and metrics by step.
        notes: what to warn of.
    """

    model: nn.Module
    history: History
    notes: tuple[str, ...] = ()


def distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    step: Distill | Mapping[str, Any] | None = None,
    *,
    recipe: Recipe | Mapping[str, Any] | str | None = None,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None = None,
    progress: bool = True,
    **settings: Any,
) -> DistillResult:
    """Trains a student, in place, to give what a teacher gives on the data.

    ::

        result = tcompress.distill(student, teacher, loader, losses=["hidden", "cosine"], steps=500, lr=1e-4)

    The student may be a smaller model (`tcompress.student_of`), or a pruned or otherwise changed copy of the teacher,
    which so is healed. Vocabularies, shapes, blocks and heads are compared before training starts. Training runs on the
    device where the student lies; under `accelerate launch` the processes share the batches.

    Args:
        student, teacher: modules that are called alike; the student in float32.
        data: batches, as a DataLoader, a list, or what else `compress` takes; gone through as often as needed. Of a
            mapping, "labels" are for the loss of that name only. With `attention_mask` [B, T], padding counts nowhere.
        step: settings as in a recipe; or give them as keywords.
        recipe: whose schemes are simulated in the training (quantization-aware), which `compress` is to run afterwards.
        evaluate: called with the student, in evaluation mode, as it will be quantized; before training, each
            `eval_every` steps, and at the end: the curve is in the result's history.
        progress: show progress on a terminal.
        settings: of `recipe.Distill`: losses, steps, lr, seed, prune, keep_zeros, checkpoint …

    Raises:
        ImportError: accelerate is not installed.
        ValueError: teacher and student do not fit together, there is nothing to train, a student that is compressed
            already or in half precision, a loss that is not finite, or a checkpoint of a run with other settings. What
            is found before training leaves the student as it was.
    """
    if step is not None and settings:
        got = f"step and {', '.join(sorted(settings))}"
        raise TypeError(message("distill", "settings", got, "a step or keywords"))
    content = settings if step is None else step
    config = content if isinstance(content, Distill) else _loaded(content)
    if student is teacher:
        hint = "copy.deepcopy(teacher) is a student that can be changed"
        raise ValueError(message("distill", "student", "the teacher itself", "another model", hint))
    whole = Recipe.load(dict(recipe) if isinstance(recipe, Mapping) else recipe) if recipe is not None else None
    result = _distill(student, teacher, data, config, whole, evaluate, progress and get_console().is_terminal)
    for note in result.notes:
        warnings.warn(f"distill: {note}", CompressionWarning, stacklevel=2)
    return result


@gradients()
def _distill(
    student: nn.Module,
    teacher: nn.Module,
    data: Any,
    config: Distill,
    recipe: Recipe | None,
    evaluate: Callable[[nn.Module], float | Mapping[str, float]] | None,
    progress: bool,
) -> DistillResult:
    _check_student(student)
    check_accelerate("distill")
    batches = Batches(data, config.seed)
    effective: dict[nn.Module, Effective] = {}
    notes: list[str] = []
    if recipe is not None and config.quantization_aware:
        effective, notes = simulated(student, recipe)
    parameters = _targeted(student, config)
    constraints: list[Constraint] = []
    zeros = layers_with_zeros(student) if config.keep_zeros else {}
    if config.prune is not None:
        constraint, skipped = _pruning(student, config.prune, config.steps)
        constraints.append(constraint)
        notes += skipped
    if zeros:
        constraints.insert(0, FixedZeros(zeros))
    for constraint in constraints:
        for module, map_ in constraint.maps().items():
            effective.setdefault(module, Effective()).weight.insert(0, map_)
    with ExitStack() as stack:
        stack.enter_context(training_modes(student, teacher, parameters, config.dropout))
        stack.enter_context(computing_with(effective))
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            module = Distiller(student, teacher, config.losses, constraints, batches.first)

        def judged() -> float | Mapping[str, float]:
            assert evaluate is not None
            with evaluating(student):
                return evaluate(student)

        history = train(
            module,
            data if batches.held is None else batches.held,
            config.training,
            parameters=[*parameters, *module.learned.parameters()],
            constraints=constraints,
            evaluate=None if evaluate is None else judged,
            checkpoint=config.checkpoint,
            fingerprint=_fingerprint(student, teacher, config, effective, batches),
            progress=progress,
        )
    return DistillResult(student, history, tuple(notes))


@transforms(Distill)
def _run(work: Work, step: Distill) -> None:
    """The step of a recipe: the original is the teacher."""
    samples = work.data(step, "it trains on them")
    result = _distill(work.model, work.original, samples, step, work.recipe, None, work.progress)
    totals = [losses["total"] for losses in result.history.losses]
    some = max(len(totals) // 10, 1)  # the batches differ
    first, last = sum(totals[:some]) / some, sum(totals[-some:]) / some
    work.notes += result.notes
    if last > first and step.prune is None:  # pruning in the training starts without a loss
        work.notes.append(f"distill: the loss rose from {first:.4g} to {last:.4g}: lower lr, or train for longer")
    nbytes = model_sizes(work.model).disk
    reason = f"{step.steps} steps, loss {first:.4g} -> {last:.4g}"
    kind = type(work.model).__name__
    work.layers.append(
        LayerReport(
            name="", kind=kind, action="distilled", reason=reason, shape=(), bytes_before=nbytes, bytes_after=nbytes
        )
    )


def _loaded(content: Mapping[str, Any]) -> Distill:
    (step,) = Recipe.load({"steps": [{**content, "step": "distill"}]}).steps
    assert isinstance(step, Distill)
    return step


def _check_student(student: nn.Module) -> None:
    packed = [name for name, module in student.named_modules() if isinstance(module, COMPRESSED)]
    if packed:
        hint = "integers cannot be trained; distill before quantizing, in one recipe, which then is simulated"
        got = f"{len(packed)} compressed layers ({packed[0]} …)"
        raise ValueError(message("distill", "student", got, "a model in floating point", hint))
    half = {p.dtype for p in student.parameters() if p.dtype in (torch.float16, torch.bfloat16)}
    if half:
        hint = "call .float(); small updates are lost in half precision, which mixed_precision= computes in safely"
        raise ValueError(message("distill", "student", f"parameters in {half.pop()}", "float32", hint))


def _targeted(student: nn.Module, config: Distill) -> list[nn.Parameter]:
    """The parameters of the modules that the step targets, each once."""
    head = output_embeddings(student)
    chosen: dict[int, nn.Parameter] = {}
    for module, names in module_names(student, {}).items():
        ignored = any_matches(config.ignore, names, module) or ("lm_head" in config.ignore and module is head)
        if ignored or not any_matches(config.targets, names, module):
            continue
        for parameter in module._parameters.values():
            if parameter is not None and parameter.is_floating_point():
                chosen[id(parameter)] = parameter
    if not chosen:
        hint = f"ignored are {list(config.ignore)}"
        raise ValueError(
            message("distill", "targets", f"{list(config.targets)}, which match no parameter", "at least one", hint)
        )
    return list(chosen.values())


def _pruning(student: nn.Module, config: TrainingPrune, steps: int) -> tuple[Constraint, list[str]]:
    """The constraint that prunes in the training, and what it leaves alone."""
    step = Prune.model_validate(config.model_dump(include={"pattern", "sparsity", "targets", "ignore"}))
    found, skips = prune_masks(student, Recipe(steps=(step,)), {})
    if not found:
        reasons = "".join(f"\n  {skip.names[0] or '(root)'}: {skip.reason}" for skip in skips[:10])
        got = f"{list(config.targets)}, which match no layer that can be pruned"
        raise ValueError(message("distill", "prune.targets", got, "at least one", f"skipped:{reasons or ' none'}"))
    layers: dict[int, tuple[str, nn.Module]] = {}  # of those with one weight, the first
    for module, pruned in found.items():
        layers.setdefault(id(module.weight), (pruned.names[0], module))
    shared = len(found) - len(layers)
    if shared and config.method == "movement":
        got = f"{shared} layers that share another one's weight"
        raise ValueError(message("distill", "prune", got, "layers with weights of their own", "take magnitude or admm"))
    return _METHODS[config.method](dict(layers.values()), config, steps), []  # type: ignore[call-arg]


def _fingerprint(
    student: nn.Module, teacher: nn.Module, config: Distill, effective: Mapping[nn.Module, Effective], batches: Batches
) -> dict[str, Any]:
    """By what a checkpoint is known to be of the same run."""
    names = {module: name for name, module in student.named_modules()}
    return {
        "distill": config.model_dump(mode="json", exclude={"checkpoint", "eval_every", "save_every"}),
        "student": digest(student),
        "teacher": digest(teacher),
        "simulated layers": sorted(names[module] for module in effective),
        "batches": None if batches.held is None else len(batches.held),
        "data": digest_of(batches.first if batches.held is None else batches.held),
    }
