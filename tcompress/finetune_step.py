"""The step of a recipe that trains integers and scales, between finding them and packing them for kernels."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcompress.distill.distiller import Distiller
from tcompress.distill.effective import Effective, computing_with
from tcompress.distill.fake_quantize import fake_quantize_input
from tcompress.distill.learned_integers import LearnedIntegers
from tcompress.distill.modes import digest, gradients, training_modes
from tcompress.distill.trainer import check_accelerate, train
from tcompress.errors import message
from tcompress.layer_job import Key
from tcompress.match import Match, any_matches, ignored, output_embeddings
from tcompress.match_attention import holding
from tcompress.nn import QuantizedLinear, SparseLinear
from tcompress.packing import PackedWeight
from tcompress.prune_step import Pruned
from tcompress.quantize import round_to_nearest
from tcompress.recipe import Finetune, Quantize, Recipe
from tcompress.replace import PackedKey, copied_model, packed_key
from tcompress.report.report import LayerReport
from tcompress.resume import digest_of
from tcompress.solve_layer import integers
from tcompress.weights import linear_weight, weight_key


def finetune_step(recipe: Recipe) -> Finetune | None:
    """The recipe's step, or None."""
    return next((step for step in recipe.steps if isinstance(step, Finetune)), None)


def check_finetune(model: nn.Module, step: Finetune, matches: Sequence[Match]) -> None:
    """What can be known before layers are solved.

    Raises:
        ImportError: accelerate is not installed. ValueError: nothing to train, or a model that is compressed in part.
    """
    check_accelerate("finetune")
    packed = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear | SparseLinear)]
    if packed:
        got = f"{len(packed)} compressed layers ({packed[0]} …)"
        hint = "nothing passes gradients through them; let one recipe do all"
        raise ValueError(message("finetune", "model", got, "a model in floating point", hint))
    if not _trained(model, matches, step):
        got = f"{list(step.targets)}, which match no layer with integers of its own"
        raise ValueError(message("finetune", "targets", got, "at least one"))


@gradients()
def finetune(
    model: nn.Module,
    teacher: nn.Module,
    step: Finetune,
    matches: Sequence[Match],
    pruned: Mapping[nn.Module, Pruned],
    converted: Mapping[nn.Module, nn.Module],
    samples: Sequence[Any] | None,
    progress: bool,
    resume: str | Path | None,
) -> tuple[list[Match], LayerReport]:
    """Trains what the matches' layers will hold.

    Args:
        model: of which the matches are; it stays as it is, a copy is trained.
        teacher: the original.
        matches, pruned: with what was found for them.
        converted: as for `match.match`.
        samples: the data, as batches.
        resume: as for `compress`.

    Returns:
        The matches with their new integers, and what the report says.

    Raises:
        ImportError: accelerate is not installed. ValueError: no data, nothing to train, a loss that is not finite, or a
            checkpoint of another run.
    """
    if samples is None:
        raise ValueError(message("compress", "data", "none", "calibration samples", "finetune: it trains on them"))
    matches = _with_shared_integers(matches)
    trained = _trained(model, matches, step)
    if not trained:
        got = f"{list(step.targets)}, which match no layer with integers of its own"
        raise ValueError(message("finetune", "targets", got, "at least one"))
    with holding(model, converted):
        student = copied_model(model, where="finetune")
    layers = {m.names[0]: student.get_submodule(m.names[0]) for m in trained.values()}
    constraint = LearnedIntegers(
        layers,
        {m.names[0]: _packed(m) for m in trained.values()},
        {m.names[0]: m.scheme.weights for m in trained.values() if m.scheme is not None},
        {m.names[0]: kept for m in trained.values() if (kept := _kept(m, m.module in pruned)) is not None},
        step.integer_rate,
    )
    effective = _effective(student, matches, pruned, trained, constraint)
    settings = step.model_dump(mode="json", exclude={"checkpoint", "eval_every", "save_every"})
    checkpoint = step.checkpoint
    if checkpoint is None and resume is not None:  # of each step that was tried, one
        named = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        checkpoint = str(Path(resume) / f"finetune-{named}")
    with ExitStack() as stack:
        stack.enter_context(training_modes(student, teacher, [], step.dropout))
        stack.enter_context(computing_with(effective))
        with torch.random.fork_rng():
            torch.manual_seed(step.seed)
            module = Distiller(student, teacher, step.losses, [constraint], samples[0])
        history = train(
            module,
            list(samples),
            step.training,
            parameters=[*module.learned.parameters(), *constraint.parameters()],
            constraints=[constraint],
            checkpoint=checkpoint,
            fingerprint={
                "finetune": settings,
                "model": digest(model),
                "teacher": digest(teacher),
                "integers": _digest_of(trained.values()),
                "batches": len(samples),
                "data": digest_of(samples),
            },
            progress=progress,
        )
    found = {key: constraint.packed(m.names[0]) for key, m in trained.items()}
    totals = [losses["total"] for losses in history.losses]
    some = max(len(totals) // 10, 1)  # the batches differ
    first, last = sum(totals[:some]) / some, sum(totals[-some:]) / some
    reason = f"{step.steps} steps, loss {first:.4g} -> {last:.4g}; {constraint.moved():.1%} of the integers moved"
    report = LayerReport(
        name="", kind=type(model).__name__, action="finetuned", reason=reason, shape=(), bytes_before=0, bytes_after=0
    )
    return [_with_integers(m, found) for m in matches], report


def _with_shared_integers(matches: Sequence[Match]) -> list[Match]:
    """Of layers that will hold the same integers, one that was solved says what they are (`replace.compressed`)."""
    known: dict[PackedKey, PackedWeight] = {}
    for m in matches:
        if isinstance(m.step, Quantize) and isinstance(m.solved, PackedWeight):
            known.setdefault(packed_key(m), m.solved)
    return [_with_integers(m, known) for m in matches]


def _with_integers(m: Match, known: Mapping[PackedKey, PackedWeight]) -> Match:
    found = known.get(packed_key(m)) if isinstance(m.step, Quantize) else None
    return m if found is None else dataclasses.replace(m, solved=found)


def _trained(model: nn.Module, matches: Sequence[Match], step: Finetune) -> dict[PackedKey, Match]:
    """The layers whose integers are trained, of those with one weight the first. All of one weight have to be such."""
    head = output_embeddings(model)
    found: dict[PackedKey, Match] = {}
    fixed: set[Key] = set()
    for m in matches:
        plain = isinstance(m.step, Quantize) and m.outliers is None and not isinstance(m.module, nn.Embedding)
        meant = any_matches(step.targets, list(m.names), m.module) and not ignored(step, list(m.names), m.module, head)
        if plain and meant:
            found.setdefault(packed_key(m), m)
        else:
            fixed.add(weight_key(m.module))
    return {key: m for key, m in found.items() if weight_key(m.module) not in fixed}


def _packed(m: Match) -> PackedWeight:
    assert isinstance(m.step, Quantize)
    return m.solved if isinstance(m.solved, PackedWeight) else integers(m.weight, m.step)


def _kept(m: Match, pruned: bool) -> torch.Tensor | None:
    """What pruning kept, in this recipe or before it, or None where nothing was pruned. Where the mask is not known any
    more, what was rounded to zero counts as pruned too."""
    if m.mask is not None:
        kept = m.mask
    else:
        kept = (_packed(m).dequantize() if pruned else linear_weight(m.module).detach()) != 0
    return None if kept.all() else kept


def _effective(
    student: nn.Module,
    matches: Sequence[Match],
    pruned: Mapping[nn.Module, Pruned],
    trained: Mapping[PackedKey, Match],
    constraint: LearnedIntegers,
) -> dict[nn.Module, Effective]:
    """How the student's layers compute: as the recipe's will. Attention stays in floating point."""
    maps = constraint.maps()
    effective: dict[nn.Module, Effective] = {}
    for m in matches:
        layer = student.get_submodule(m.names[0])
        own = trained.get(packed_key(m)) if isinstance(m.step, Quantize) else None
        fixed = None if own is not None else partial(_always, _computed(m))
        weight = fixed or maps[student.get_submodule(own.names[0])]  # type: ignore[union-attr]
        activations = None if m.scheme is None or isinstance(m.module, nn.Embedding) else m.scheme.activations
        quantizer = None
        if activations is not None:
            quantizer = partial(fake_quantize_input, args=activations, fixed=m.input_scale, outliers=m.outliers)
        effective[layer] = Effective([weight], quantizer, None if m.bias is None else m.bias.detach())
    for module, p in pruned.items():
        layer = student.get_submodule(p.names[0])
        if layer not in effective:
            assert p.weight is not None or p.mask is not None
            kept = linear_weight(module).masked_fill(~p.mask, 0) if p.weight is None else p.weight  # type: ignore[operator]
            effective[layer] = Effective([partial(_always, kept.detach())])
    return effective


def _always(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return value.to(weight.dtype)


@torch.no_grad()
def _computed(m: Match) -> torch.Tensor:
    """What a layer that is not trained will multiply by, or look up in, [N, K]."""
    if isinstance(m.step, Quantize):
        weight = _packed(m).dequantize()
        if m.outliers is not None:
            weight[:, m.outliers] = m.weight[:, m.outliers].float()
        return weight
    return m.weight if m.scheme is None else round_to_nearest(m.weight, m.scheme.weights).dequantize()


def _digest_of(matches: Any) -> str:
    found = hashlib.sha256()
    for m in matches:
        packed = _packed(m)
        for tensor in (packed.qdata, packed.scale, packed.zero_point):
            if tensor is not None:
                found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
