"""Matches the layers of a recipe, solves them, packs what was found, and puts it in their places."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import track
from torch import nn

from tcompress import attention_step, calibrate, replace
from tcompress.fuse import fuse
from tcompress.input_scales import has_static, with_input_scales
from tcompress.layer_job import Solution, Written
from tcompress.match import COMPRESSED, Match, match, unmatched
from tcompress.match_attention import match_attention
from tcompress.nn import OutlierLinear, SparseLinear
from tcompress.prune_step import Pruned, prune_masks
from tcompress.recipe import Prune, Quantize, Recipe
from tcompress.report.attention import AttentionReport
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.solve import solve, steps_with_data
from tcompress.sparse_kernel import DENSE
from tcompress.structure import carry
from tcompress.targeted import left_report, replaced_report
from tcompress.weights import linear_weight, weight_id

#: What is said of a layer whose zeros no kernel turns into time.
NO_SPEEDUP = "no speedup from this sparsity"


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
) -> Swapped:
    """Runs the steps of a recipe that prune, quantize or leave out zeros.

    Args:
        data, inplace, resume: as for `compress`.
        progress: whether to show progress on the terminal.
        required: raise if there is nothing to do.

    Raises:
        ValueError: as `compress`; `model` is then unchanged, but in place, where an algorithm fails on a later layer,
            the layers before it may be pruned.
    """
    attentions, attention_skips = match_attention(model, recipe)
    converted: dict[nn.Module, nn.Module] = {m.module: m.converted for m in attentions if m.converted is not None}
    pruned, prune_skips = prune_masks(model, recipe, converted)
    masks = {module: p.zeros if p.mask is None else p.mask for module, p in pruned.items()}
    required = required and not attentions and not pruned
    matches, skips = match(model, recipe, converted, required, [*prune_skips, *attention_skips], masks)

    notes = unmatched(model, recipe, converted)
    if not pruned and any(isinstance(step, Prune) for step in recipe.steps):
        notes.append("no layer was pruned")
    first: calibrate.Reference | None = None
    written: list[LayerReport] = []
    if steps_with_data(recipe):
        if inplace and data is not None:  # before any layer changes
            data = list(calibrate.batches(data))
            with calibrate.evaluating(model):
                first = calibrate.reference(model, data[0])
        solved, data, solving = solve(model, recipe, matches, pruned, converted, data, progress, resume, inplace)
        for module, p in list(pruned.items()):
            done = solved[module].written
            if done is None:
                pruned[module] = _pruned_by(solved[module], p)
            else:
                written.append(_written_report(module, pruned.pop(module), done))
        matches = [_with_solution(m, solved) for m in matches]
        notes += solving
        del solved

    if has_static(matches):
        data = None if data is None else list(calibrate.batches(data))
        matches, fixing = with_input_scales(model, matches, converted, data)
        notes += fixing

    cache: replace.PackedCache = {}
    # Of layers with one weight, one that was solved says what its integers are.
    ordered = sorted(matches, key=lambda m: m.solved is None)
    steps = track(ordered, "compressing", disable=not progress, transient=True)
    replacements = {m.module: replace.compressed(m, cache) for m in steps}
    not_pruned = {skip.module: skip.reason for skip in prune_skips}
    layers = [_layer_report(m, replacements[m.module], not_pruned.get(m.module, "")) for m in matches]
    only_pruned = {module: p for module, p in pruned.items() if module not in replacements}
    tied: dict[int, nn.Parameter] = {}
    replacements |= {module: replace.pruned_copy(module, p.mask, tied, p.weight) for module, p in only_pruned.items()}

    found: calibrate.Comparison | None = None
    if data is not None and (replacements or attentions or first is None):
        found = calibrate.compare_outputs(model, replacements, data, attentions)
        layers = [
            layer.model_copy(update={"output_sqnr_db": found.layers[m.module].sqnr_db})
            for layer, m in zip(layers, matches, strict=True)
        ]
        called = {weight_id(m.module) for m in matches if found.layers[m.module].calls}
        idle = [m.names[0] or "(root)" for m in matches if weight_id(m.module) not in called]
        notes += [f"{name} was never called on the data" for name in idle]
    attention = attention_step.decide(attentions, found, notes)

    layers += written + [_pruned_report(module, p, replacements[module], found) for module, p in only_pruned.items()]
    reasons = {skip.module: skip for skip in [*prune_skips, *skips] if skip.module not in replacements}
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
        notes=notes + _speed_notes(replacements),
        reference=found.reference if first is None and found is not None else first,
        smaller_is_meant=bool(matches),
    )


def _pruned_by(found: Solution, p: Pruned) -> Pruned:
    assert found.mask is not None
    return dataclasses.replace(p, mask=found.mask, weight=found.weight)


def _with_solution(m: Match, solved: Mapping[nn.Module, Solution]) -> Match:
    if m.module not in solved:  # an embedding
        return m
    found = solved[m.module]
    weight = found.weight if found.packed is None else found.packed
    return dataclasses.replace(m, mask=found.mask, solved=weight, bias=found.bias, outliers=found.outliers)


def _layer_report(m: Match, replacement: nn.Module, reason: str) -> LayerReport:
    assert isinstance(replacement, COMPRESSED)
    stored = replacement.dequantize() if isinstance(replacement, OutlierLinear) else replacement.packed.dequantize()
    action = "float" if m.scheme is None else m.scheme.name
    if isinstance(m.step, Quantize) and m.step.algorithm != "rtn":
        action += f" {m.step.algorithm}"
    if m.input_scale is not None:
        reason = "; ".join(filter(None, (f"inputs in {m.input_scale.lo:.3g} … {m.input_scale.hi:.3g}", reason)))
    if isinstance(replacement, OutlierLinear):
        count = replacement.outlier_columns.numel()
        reason = "; ".join(filter(None, (f"{count} outlier inputs in floating point", reason)))
    if isinstance(replacement, SparseLinear):
        action += f" sparse {replacement.pattern}"
        reason = "; ".join(filter(None, (_sparse_reason(replacement), reason)))
    return replaced_report(m.names, m.module, replacement, action, reason, stored)


def _sparse_reason(layer: SparseLinear) -> str:
    choice = layer.choice
    if layer.layout == DENSE:
        return NO_SPEEDUP
    if choice is None or choice.source == "model":
        return f"kernel {layer.layout}"
    dense, own = (choice.seconds[name] * 1e3 for name in (DENSE, layer.layout))
    return f"kernel {layer.layout}, {choice.speedup:.2f}x dense ({own:.3f} of {dense:.3f} ms, {choice.tokens} tokens)"


def _pruned_report(
    module: nn.Module, pruned: Pruned, replacement: nn.Module, found: calibrate.Comparison | None
) -> LayerReport:
    report = replaced_report(pruned.names, module, replacement, _pruned_action(pruned))
    return report if found is None else report.model_copy(update={"output_sqnr_db": found.layers[module].sqnr_db})


def _written_report(module: nn.Module, pruned: Pruned, written: Written) -> LayerReport:
    """Of a layer that was pruned in its own place."""
    weight, nbytes = linear_weight(module), model_sizes(module).disk
    return LayerReport(
        name=pruned.names[0],
        aliases=pruned.names[1:],
        kind=type(module).__name__,
        action=_pruned_action(pruned),
        shape=tuple(weight.shape),
        bytes_before=nbytes,
        bytes_after=nbytes,
        sparsity=int((weight == 0).sum()) / max(weight.numel(), 1),
        weight_sqnr_db=written.weight_sqnr_db,
        output_sqnr_db=written.output_sqnr_db,
    )


def _pruned_action(pruned: Pruned) -> str:
    return f"pruned {pruned.step.pattern}" + (f" {pruned.step.algorithm}" if pruned.step.needs_data else "")


def _speed_notes(replacements: dict[nn.Module, nn.Module]) -> list[str]:
    sparse = [m for m in replacements.values() if isinstance(m, SparseLinear)]
    dense = sum(m.layout == DENSE for m in sparse)
    return [f"{dense} of {len(sparse)} sparse layers run dense: {NO_SPEEDUP}"] if dense else []
