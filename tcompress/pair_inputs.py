"""What the steps that scale pairs have in common: which pairs, what their readers are given, and the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcompress.collect import Key, collect_all
from tcompress.errors import message
from tcompress.match import any_matches, ignored, match, module_names, output_embeddings
from tcompress.pairs import Pair, find_pairs
from tcompress.pairs.find import NoPair
from tcompress.quantize.scheme import Scheme
from tcompress.recipe import AWQ, Quantize, Smooth
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.statistics import InputStatistics
from tcompress.transform import Work
from tcompress.weights import linear_weight


@dataclass(frozen=True, eq=False)
class Target:
    """A pair, and of its readers those that a step means, with the schemes by which the recipe quantizes them."""

    pair: Pair
    schemes: Mapping[nn.Module, Scheme | None]


def targets_of(work: Work, step: Smooth | AWQ, sample: Any, scheme_needed: bool) -> list[Target]:
    """The pairs that a step means; those norms that are in none are added to `work.notes`, with the reasons.

    Args:
        scheme_needed: leave out readers that no `Quantize` step of the recipe quantizes.

    Raises:
        ValueError: a scheme is needed and the recipe has no step with one.
    """
    quantized = [s for s in work.recipe.steps if isinstance(s, Quantize) and s.scheme is not None]
    if scheme_needed and not quantized:
        hint = f"add {{step: quantize, scheme: W4A16-g128}} after {step.step}, which decides by the error under it"
        raise ValueError(message("compress", "recipe", f"{step.step} without a scheme", "a quantize step", hint))
    schemes: dict[nn.Module, Scheme] = {}
    if quantized:
        rest = work.recipe.model_copy(update={"steps": tuple(quantized)})
        matches, _ = match(work.model, rest, required=False)
        schemes = {m.module: m.step.scheme for m in matches if m.step.scheme is not None}
    names, head = module_names(work.model, {}), output_embeddings(work.model)
    pairs, skipped = find_pairs(work.model, sample)
    found = []
    for pair in pairs:
        if step.sources not in ("all", "linear" if pair.kind == "linear" else "norm"):
            continue
        meant = {
            c.module: schemes.get(c.module)
            for c in pair.consumers
            if any_matches(step.targets, names[c.module], c.module)
            and ignored(step, names[c.module], c.module, head) is None
            and (c.module in schemes or not scheme_needed)
        }
        if meant:
            found.append(Target(pair, meant))
    if step.sources != "linear":
        work.notes += _skipped_notes(step.step, skipped)
    if not found:
        work.notes.append(f"{step.step}: no scales can be moved to the layers that it targets: nothing was changed")
    return found


def _skipped_notes(step: str, skipped: Sequence[NoPair]) -> Iterator[str]:
    """One note a reason why norms feed no pair."""
    reasons: dict[str, list[str]] = {}
    for item in skipped:
        weight = item.module._parameters.get("weight")
        if weight is not None and weight.dim() == 1:
            reasons.setdefault(item.reason, []).append(item.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{step}: {names[0]}{more} gives its readers no scales: {reason}"


def collect_readers(
    targets: Sequence[Target], run: Callable[[], None], hessian: bool, rows: int = 0
) -> dict[Key, InputStatistics]:
    """What the readers of pairs are given while something runs, by weight (`collect.collect`)."""
    return collect_all([list(target.schemes) for target in targets], run, hessian, rows=rows)


def report(target: Target, step: str, what: str) -> LayerReport:
    """What the report says of a pair's source."""
    pair = target.pair
    size = model_sizes(pair.source).disk
    weight = linear_weight(pair.source) if pair.kind == "linear" else pair.source.weight
    assert isinstance(weight, torch.Tensor)
    return LayerReport(
        name=pair.name,
        kind=type(pair.source).__name__,
        action=step,
        reason=f"{what}, into {', '.join(c.name.rpartition('.')[2] for c in pair.consumers)}",
        shape=tuple(weight.shape),
        bytes_before=size,
        bytes_after=size,
    )
