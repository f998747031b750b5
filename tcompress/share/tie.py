"""Cross-layer sharing: blocks that follow one another use one set of weights.

Lan et al., "ALBERT", arXiv 1909.11942, section 3.1 ("Cross-layer parameter sharing"), here as a start for training from
a model that has no shared layers. What is tied are the parameters, not the modules: each block keeps what it knows of
its own place (the index of its cache), and its norms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tcompress import calibrate
from tcompress.blocks import find_chains
from tcompress.errors import message
from tcompress.match import Skip, any_matches, ignored, module_names, output_embeddings
from tcompress.recipe import Share
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.structure import mark_shared
from tcompress.targeted import left_report
from tcompress.transform import Work, transforms

#: The parameters of several modules that are to be one: (module, name of the parameter) of each.
_Slots = list[tuple[nn.Module, str]]
#: How far the model is from what it was.
_Error = Callable[[], float]


@transforms(Share)
def run(work: Work, step: Share) -> None:
    """Ties the parameters of groups of blocks, or those of the two embeddings."""
    error: _Error | None = None
    if step.init == "best":
        error = _output_error(work, work.data(step, "'best' is what changes the model's output least"))
    tied = _layers(work, step, error) if step.structure == "layers" else _embeddings(work, error)
    if tied:
        mark_shared(work.model)
    else:
        work.notes.append("share: nothing was tied")


def _layers(work: Work, step: Share, error: _Error | None) -> bool:
    names = module_names(work.model, {})
    chains = _chains(work, step)
    if not chains:
        work.notes.append("share: no sequence of blocks was found")
    tied = False
    for chain in chains:
        for start in range(0, len(chain) - step.group + 1, step.group):
            members = chain[start : start + step.group]
            slots, reason = _matching(work, step, members, names)
            paths = tuple(names[block][0] for block in members)
            if not slots:
                work.layers.append(left_report(Skip(paths, members[0], reason)))
                continue
            before = model_sizes(nn.ModuleList(members)).disk
            chosen = _tie(slots, error)
            after = model_sizes(nn.ModuleList(members)).disk
            number = sum(module.get_parameter(key).numel() for module, key in (one[0] for one in slots))
            work.layers.append(_report(paths, members[0], f"shared by {len(members)}: {chosen}", number, before, after))
            tied = True
        left = len(chain) % step.group
        if left:
            reason = f"the last {left} of {len(chain)} blocks are no group of {step.group}"
            paths = tuple(names[block][0] for block in chain[-left:])
            work.layers.append(left_report(Skip(paths, chain[-1], reason)))
    return tied


def _report(
    paths: tuple[str, ...], module: nn.Module, action: str, parameters: int, before: int, after: int
) -> LayerReport:
    return LayerReport(
        name=paths[0],
        aliases=paths[1:],
        kind=type(module).__name__,
        action=action,
        shape=(parameters,),
        bytes_before=before,
        bytes_after=after,
    )


def _chains(work: Work, step: Share) -> list[list[nn.Module]]:
    """The model's blocks: as they run on the data, or without data the longest lists of blocks of one class."""
    if work.samples is not None:
        with calibrate.evaluating(work.model):
            chains = find_chains(work.model, work.samples[0])
    else:
        lists = [list(m) for m in work.model.modules() if isinstance(m, nn.ModuleList) and len(m) >= step.group]
        lists = [blocks for blocks in lists if len({type(block) for block in blocks}) == 1]
        inside = {m for blocks in lists for block in blocks for m in block.modules()}
        chains = [blocks for blocks in lists if not any(b in inside and _deeper(b, lists) for b in blocks)]
    return [chain for chain in chains if len(chain) >= step.group]


def _deeper(block: nn.Module, lists: Sequence[Sequence[nn.Module]]) -> bool:
    """Whether a block is within a member of another list."""
    return any(block is not other and block in set(other.modules()) for blocks in lists for other in blocks)


def _matching(
    work: Work, step: Share, members: Sequence[nn.Module], names: dict[nn.Module, list[str]]
) -> tuple[list[_Slots], str]:
    """The parameters of targeted modules that all members have, in one shape; or none, and why."""
    head = output_embeddings(work.model)
    own = [dict(block.named_modules()) for block in members]
    slots: list[_Slots] = []
    for name, module in own[0].items():
        paths = names[module]
        if not module._parameters or not any_matches(step.targets, paths, module):
            continue
        if ignored(step, paths, module, head) is not None:
            continue
        same = [modules.get(name) for modules in own]
        for key, parameter in module._parameters.items():
            if parameter is None:
                continue
            others = [None if m is None else m._parameters.get(key) for m in same]
            if any(p is None or p.shape != parameter.shape for p in others):
                return [], f"{name}.{key} has not the same shape in all members"
            if len({id(p) for p in others}) > 1:
                slots.append([(m, key) for m in same if m is not None])
    return slots, "" if slots else "no targeted parameter that is not shared already"


def _tie(slots: list[_Slots], error: _Error | None) -> str:
    """Ties parameters, and says what they start from: the mean, or with an error what makes it least."""
    members = len(slots[0])
    originals = [[module._parameters[key] for module, key in one] for one in slots]

    def choose(which: int | None) -> None:
        for one, values in zip(slots, originals, strict=True):
            dense = [v.detach() for v in values if v is not None]
            value = (
                torch.stack([v.double() for v in dense]).mean(0).to(dense[0].dtype) if which is None else dense[which]
            )
            shared = nn.Parameter(value.clone(), bool(values[0] is not None and values[0].requires_grad))
            for module, key in one:
                module._parameters[key] = shared

    candidates: list[int | None] = [None]
    if error is not None:
        candidates += range(members)
        costs = []
        for which in candidates:
            choose(which)
            costs.append(error())
        best = candidates[min(range(len(costs)), key=costs.__getitem__)]
    else:
        best = None
    choose(best)
    return "mean" if best is None else f"member {best + 1}"


def _output_error(work: Work, samples: list[Any]) -> _Error:
    """A function that says how far the model's output is from the original's, relative, as a mean of squares."""
    expected: list[torch.Tensor | None] = []
    with calibrate.evaluating(work.original):
        for sample in samples:
            expected.append(calibrate.output_tokens(work.original, sample))
    if all(output is None for output in expected):
        raise ValueError(message("compress", "data", "outputs without a float tensor", "one to compare", "init: mean"))

    def error() -> float:
        noise = signal = 0.0
        with calibrate.evaluating(work.model):
            for sample, output in zip(samples, expected, strict=True):
                got = calibrate.output_tokens(work.model, sample)
                if got is not None and output is not None:
                    noise += float((got.double() - output.double()).square().sum())
                    signal += float(output.double().square().sum())
        return noise / signal if signal else noise

    return error


def _embeddings(work: Work, error: _Error | None) -> bool:
    model: Any = work.model
    head = output_embeddings(model)
    getter = getattr(model, "get_input_embeddings", None)
    table = getter() if callable(getter) else None
    if not isinstance(head, nn.Linear) or not isinstance(table, nn.Embedding):
        work.notes.append("share: embeddings: the model does not name its input embedding and output layer")
        return False
    paths = tuple(name for name, m in model.named_modules() if m is head or m is table)
    reason = None
    if head.weight is table.weight:
        reason = "tied already"
    elif head.weight.shape != table.weight.shape:
        reason = f"{list(table.weight.shape)} and {list(head.weight.shape)} are not one shape"
    if reason is not None:
        work.layers.append(left_report(Skip(paths, table, reason)))
        return False
    both = nn.ModuleList([table, head])
    before = model_sizes(both).disk
    chosen = _tie([[(table, "weight"), (head, "weight")]], error)
    after = model_sizes(both).disk
    work.layers.append(_report(paths, table, f"tied: {chosen}", table.weight.numel(), before, after))
    if getattr(getattr(model, "config", None), "tie_word_embeddings", None) is False:
        model.config.tie_word_embeddings = True
    return True
