"""Matches the layers of a recipe, solves them, packs what was found, and puts it in their places."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import nn

from tcompress import attention_step, calibrate, memory, replace
from tcompress.finetune_step import check_finetune, finetune, finetune_step
from tcompress.fuse import fuse
from tcompress.in_place import InPlace, placed_at_once, with_solution
from tcompress.input_scales import has_static, with_input_scales
from tcompress.layer_report import NO_SPEEDUP, compressed_report, pruned_report, written_report
from tcompress.match import match, unmatched
from tcompress.match_attention import match_attention
from tcompress.nn import SparseLinear
from tcompress.prune_step import prune_masks
from tcompress.recipe import Prune, Recipe
from tcompress.report.attention import AttentionReport
from tcompress.report.report import LayerReport
from tcompress.solve import solve, steps_with_data
from tcompress.sparse_kernel import DENSE
from tcompress.structure import carry
from tcompress.targeted import left_report
from tcompress.weights import weight_id


@dataclass(frozen=True)
class Swapped:
    """A model whose layers were swapped.

    Attributes:
        model: the new one.
        layers, attention: what the report says of each.
        notes: what there is to warn of.
        reference: the model's output on the first batch of the data, before; None without data.
        smaller_is_meant: whether the recipe's steps were to make the file smaller.
    """

    model: nn.Module
    layers: list[LayerReport]
    attention: list[AttentionReport]
    notes: list[str]
    reference: calibrate.Reference | None
    smaller_is_meant: bool


def swap_layers(
    model: nn.Module,
    recipe: Recipe,
    data: Any,
    inplace: bool,
    progress: bool = False,
    required: bool = True,
    resume: str | Path | None = None,
    max_memory: int | None = None,
    original: nn.Module | None = None,
) -> Swapped:
    """Runs the steps of a recipe that prune, quantize or leave out zeros.

    Args:
        data, inplace, resume, max_memory: as for `compress`, the last in bytes.
        progress: whether to show progress on the terminal.
        required: raise if there is nothing to do.
        original: whose outputs a `Finetune` step aims at; by default the model as it is.

    Raises:
        ValueError: as `compress`; `model` is then unchanged, but in place, where an algorithm fails on a later layer,
            the blocks before it may be compressed.
    """
    attentions, attention_skips = match_attention(model, recipe)
    converted: dict[nn.Module, nn.Module] = {m.module: m.converted for m in attentions if m.converted is not None}
    pruned, prune_skips = prune_masks(model, recipe, converted)
    masks = {module: p.zeros if p.mask is None else p.mask for module, p in pruned.items()}
    required = required and not attentions and not pruned
    matches, skips = match(model, recipe, converted, required, [*prune_skips, *attention_skips], masks)
    del masks
    if inplace:
        replace.check_in_place(model, [*(m.module for m in matches), *pruned, *converted])

    notes = unmatched(model, recipe, converted)
    if not pruned and any(isinstance(step, Prune) for step in recipe.steps):
        notes.append("no layer was pruned")
    tune = finetune_step(recipe)
    if tune is not None:
        check_finetune(model, tune, matches)
    every: list[Any] | None = None
    if data is not None and (tune is not None or recipe.samples is not None):
        every = list(calibrate.batches(data))
        data = every[: recipe.samples]
    if tune is not None and original is None:
        original = replace.copied_model(model) if inplace else model
    first: calibrate.Reference | None = None
    written: list[LayerReport] = []
    cache: replace.PackedCache = {}
    not_pruned = {skip.module: skip.reason for skip in prune_skips}
    early: InPlace | None = None
    if steps_with_data(recipe):
        if inplace and data is not None:  # before any layer changes
            data = list(calibrate.batches(data))
            with calibrate.evaluating(model):
                first = calibrate.reference(model, data[0])
            if placed_at_once(recipe, matches, bool(attentions)):
                early = InPlace(model, matches, cache, not_pruned)
        solved, data, solving = solve(
            model, recipe, matches, pruned, converted, data, progress, resume, inplace, max_memory, early
        )
        for module, p in list(pruned.items()):
            known = solved[module].written
            if known is None:
                pruned[module] = dataclasses.replace(p, mask=None, weight=solved[module].weight)
            else:
                written.append(written_report(module, pruned.pop(module), known))
        # An embedding is not solved.
        matches = [with_solution(m, solved[m.module]) if m.module in solved else m for m in matches]
        notes += solving
        del solved
    if has_static(matches):
        data = None if data is None else list(calibrate.batches(data))
        matches, fixing = with_input_scales(model, matches, converted, data)
        notes += fixing
    tuned: list[LayerReport] = []
    if tune is not None:
        assert original is not None
        matches, report = finetune(model, original, tune, matches, pruned, converted, every, progress, resume)
        tuned.append(report)

    # Of layers with one weight, one that was solved says what its integers are.
    done = {} if early is None else early.replaced
    order = sorted(range(len(matches)), key=lambda i: matches[i].solved is None)
    order = [i for i in order if matches[i].module not in done]
    replacements: dict[nn.Module, nn.Module] = {}
    reports = {} if early is None else dict(early.reports)
    for module, new in done.items():
        new.train(module.training)
        pruned.pop(module, None)
    for i in track(order, "compressing", disable=not progress, transient=True):
        this = matches[i]
        replacements[this.module] = replace.compressed(this, cache)
        reports[this.module] = compressed_report(this, replacements[this.module], not_pruned.get(this.module, ""))
        # The module has the weight, as its kernel reads it.
        matches[i] = dataclasses.replace(this, mask=None, solved=None, bias=None, outliers=None)
        pruned.pop(this.module, None)
        del this
        memory.trim()
    layers = [reports[m.module] for m in matches]
    tied: dict[int, nn.Parameter] = {}
    for module, p in pruned.items():
        replacements[module] = replace.pruned_copy(module, p.mask, tied, p.weight)
        pruned[module] = dataclasses.replace(p, mask=None, weight=None)

    found: calibrate.Comparison | None = None
    if data is not None and (replacements or attentions or first is None):
        found = calibrate.compare_outputs(model, replacements, data, attentions)
        layers = [
            layer.model_copy(update={"output_sqnr_db": found.layers[m.module].sqnr_db})
            if m.module in replacements
            else layer
            for layer, m in zip(layers, matches, strict=True)
        ]
    if data is not None:
        errors = zip(layers, matches, strict=True)
        called = {weight_id(m.module) for layer, m in errors if layer.output_sqnr_db is not None}
        idle = [m.names[0] or "(root)" for m in matches if weight_id(m.module) not in called]
        notes += [f"{name} was never called on the data" for name in idle]
    attention = attention_step.decide(attentions, found, notes)

    of_pruned = [pruned_report(module, p, replacements[module], found) for module, p in pruned.items()]
    layers = tuned + layers + written + of_pruned
    reasons = {skip.module: skip for skip in [*prune_skips, *skips] if skip.module not in replacements | done}
    skipped = [left_report(skip) for skip in reasons.values()]
    for m in attentions:
        if m.converted is not None:
            replacements[m.module] = replace.assembled(m.converted, replacements)
    for old, new in replacements.items():
        carry(old, new)
    compressed = replace.swap(model, replacements, inplace=inplace)
    attention_step.install(compressed, attentions, attention)
    fuse(compressed)
    return Swapped(
        model=compressed,
        layers=layers + skipped,
        attention=attention + attention_step.skipped(attention_skips),
        notes=notes + _speed_notes(replacements | done),
        reference=found.reference if first is None and found is not None else first,
        smaller_is_meant=bool(matches),
    )


def _speed_notes(replacements: dict[nn.Module, nn.Module]) -> list[str]:
    sparse = [m for m in replacements.values() if isinstance(m, SparseLinear)]
    dense = sum(m.layout == DENSE for m in sparse)
    return [f"{dense} of {len(sparse)} sparse layers run dense: {NO_SPEEDUP}"] if dense else []
