"""The step that takes heads and channels out of a model, and whole layers (`drop_layers`)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tcompress import calibrate
from tcompress.block_walk import Stage, collect, walk
from tcompress.channels import Found, Group, find_groups, is_plain_linear, moved
from tcompress.errors import message
from tcompress.match import Skip, any_matches, ignored, module_names, output_embeddings
from tcompress.padding import counted
from tcompress.prune.config import fit_sizes
from tcompress.prune.drop_layers import drop_layers
from tcompress.prune.importance import activation_importance, taylor_importance, weight_importance
from tcompress.prune.slicing import repaired, slice_group
from tcompress.recipe import Shrink
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.structure import set_linear
from tcompress.targeted import left_report
from tcompress.transform import Work, transforms
from tcompress.weights import is_conv1d, linear_bias, linear_weight, weight_key


@transforms(Shrink)
def run(work: Work, step: Shrink) -> None:
    """Structured pruning by the step's structure."""
    samples = work.data(step, "what depends on what is found by running the model")
    with _plain_attention(work.model):
        changed = (drop_layers if step.structure == "layers" else _narrow)(work, step, samples)
    if not changed:
        work.notes.append(f"shrink: {step.structure}: nothing was removed")


def _narrow(work: Work, step: Shrink, samples: list[object]) -> bool:
    names = {module: paths[0] for module, paths in module_names(work.model, {}).items()}
    groups = _targeted(work, step, [_small(work.model, samples[0])], names)
    if not groups:
        return False
    scores = _scores(work, step, groups, samples) if step.importance != "activation" or step.scope == "model" else None
    everywhere = None if scores is None else _choose(step, scores)
    sizes: list[tuple[int, int]] = []
    consumers = [group.consumer for group in groups]
    by_consumer = {group.consumer: i for i, group in enumerate(groups)}
    with calibrate.evaluating(work.model):
        for stage in walk(work.model, samples, consumers, work.progress):
            needed = step.repair or everywhere is None
            statistics = collect(stage, hessian=True) if needed else {}
            for consumer in stage.modules:
                group, key = groups[by_consumer[consumer]], weight_key(consumer)
                found = statistics.get(key)
                hessian = None if found is None or found.count == 0 else found.hessian
                if everywhere is not None:
                    kept = everywhere[by_consumer[consumer]]
                elif hessian is not None:
                    weight = linear_weight(consumer)
                    score = activation_importance(weight, hessian, group.inputs, group.count)
                    kept = _choose(_by_layer(step), [score])[0]
                else:
                    work.layers.append(_left(group, names, "it has no calibration inputs"))
                    continue
                sizes += _apply(work, step, group, kept, hessian, stage, names)
    fit_sizes(work.model, sizes)
    return bool(sizes)


def _small(model: nn.Module, sample: Any) -> Any:
    """The first two of a batch, where the model takes them: what depends on what shows in few tokens."""
    cut: Any = None
    if isinstance(sample, torch.Tensor):
        cut = sample[:2]
    elif isinstance(sample, Mapping) and all(isinstance(t, torch.Tensor) and t.dim() > 1 for t in sample.values()):
        cut = {key: t[:2] for key, t in sample.items()}
    if cut is None:
        return sample
    try:
        with calibrate.evaluating(model):
            calibrate.run(model, cut)
    except (RuntimeError, ValueError, IndexError):
        return sample  # the first dimension is not that of the batch
    return cut


def _by_layer(step: Shrink) -> Shrink:
    """The step with each layer's own ranking."""
    return step.model_copy(update={"scope": "layer"})


def _targeted(work: Work, step: Shrink, samples: list[object], names: Mapping[nn.Module, str]) -> list[Group]:
    """The groups of the structure that the step asks for, all layers of which it targets."""
    linear = [m for m in work.model.modules() if m is not work.model and is_plain_linear(m)]
    users: dict[int, int] = {}
    for module in work.model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users[id(parameter)] = users.get(id(parameter), 0) + 1
    all_names, head = module_names(work.model, {}), output_embeddings(work.model)
    groups: list[Group] = []
    known: dict[object, tuple[Found, nn.Module]] = {}
    with calibrate.evaluating(work.model):
        for stage in walk(work.model, samples, linear):
            if not stage.modules:
                continue
            # Blocks that look alike are taken to be alike; slicing checks each.
            looks = _looks(stage.block)
            if looks not in known:
                known[looks] = find_groups(stage.block, stage.run), stage.block
            found = moved(*known[looks], stage.block)
            groups += found.groups
            members = {m for g in found.groups for m in (g.consumer, *(p.layer for p in g.producers))}
            for layer, why in found.reasons.items():
                own = layer in stage.modules and layer not in members
                if own and any_matches(step.targets, all_names[layer], layer):
                    work.layers.append(left_report(Skip(tuple(all_names[layer]), layer, why)))
    kept: list[Group] = []
    for group in groups:
        if group.is_heads != (step.structure == "heads"):
            continue
        layers = [group.consumer, *(p.layer for p in group.producers)]
        if not all(any_matches(step.targets, all_names[m], m) for m in layers):
            continue
        reason: str | None = next((r for m in layers if (r := ignored(step, all_names[m], m, head))), None)
        if reason is None and any(users[id(m.weight)] > 1 for m in layers):
            reason = "one of its weights is also another module's"
        if reason is not None:
            work.layers.append(_left(group, names, reason))
            continue
        numbers = tuple((m, n) for m, n in group.numbers if not _is_index(work.model, m, n))
        kept.append(replace(group, numbers=numbers))
    if not kept:
        work.notes.append(f"shrink: no {step.structure} were found among the targeted layers")
    return kept


def _looks(block: nn.Module) -> object:
    """The same for blocks whose modules have the same names, classes and sizes."""
    shapes = {name: parameter.shape for name, parameter in block.named_parameters()}
    return tuple((name, type(m)) for name, m in block.named_modules()), tuple(shapes.items())


def _is_index(model: nn.Module, module: nn.Module, name: str) -> bool:
    """Whether a number tells modules of a class apart, as the index of a layer does."""
    values = [vars(m)[name] for m in model.modules() if type(m) is type(module) and name in vars(m)]
    return len(values) > 1 and len(set(values)) == len(values)


def _scores(work: Work, step: Shrink, groups: Sequence[Group], samples: list[object]) -> list[torch.Tensor]:
    """Of the model as it is."""
    if step.importance == "weight":
        scores = [weight_importance(group) for group in groups]
        return [score / score.sum().clamp(min=1e-30) for score in scores]
    if step.importance == "taylor":
        scores = taylor_importance(work.model, groups, samples)
        if not all(bool(torch.isfinite(score).all()) for score in scores):
            raise ValueError(
                message("compress", "data", "a loss with NaN or infinity", "a finite one", "shrink: taylor")
            )
        return scores
    found: dict[nn.Module, torch.Tensor] = {}
    with calibrate.evaluating(work.model):
        by_consumer = {group.consumer: group for group in groups}
        for stage in walk(work.model, samples, list(by_consumer), work.progress):
            stream = _Energy()
            with stream.of(stage.block):
                statistics = collect(stage, hessian=True)
            for consumer in stage.modules:
                group, hessian = by_consumer[consumer], statistics[weight_key(consumer)].hessian
                assert hessian is not None
                score = activation_importance(linear_weight(consumer), hessian, group.inputs, group.count)
                found[consumer] = score / stream.mean
    return [found[group.consumer] for group in groups]


class _Energy:
    """The mean square of what a block returns, by which units of different blocks are compared: that of a decoder's
    stream grows from block to block."""

    def __init__(self) -> None:
        self.total, self.tokens = 0.0, 0

    @property
    def mean(self) -> float:
        return max(self.total / max(self.tokens, 1), 1e-30)

    @contextmanager
    def of(self, block: nn.Module) -> Iterator[None]:
        handle = block.register_forward_hook(self._hook)
        try:
            yield
        finally:
            handle.remove()

    def _hook(self, module: nn.Module, args: object, output: object) -> None:
        tensor = calibrate.first_tensor(output)
        if tensor is not None and tensor.dim():
            tensor = counted(tensor)
            self.total += float(tensor.float().nan_to_num(0, 0, 0).square().sum())
            self.tokens += tensor.shape[:-1].numel()


def _choose(step: Shrink, scores: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """bool [units] for each group: what stays. At least one unit of each does."""
    if step.scope == "layer":
        left = [_at_least(len(score) - int(step.ratio * len(score)), len(score), step.multiple) for score in scores]
    else:
        every = torch.cat(list(scores))
        removed = int(step.ratio * len(every))
        gone = torch.zeros(len(every), dtype=torch.bool)
        gone[every.sort(stable=True).indices[:removed]] = True
        parts = gone.split([len(score) for score in scores])
        left = [_at_least(int((~part).sum()), len(part), step.multiple) for part in parts]
    kept = []
    for score, number in zip(scores, left, strict=True):
        mask = torch.zeros(len(score), dtype=torch.bool)
        mask[score.sort(descending=True, stable=True).indices[:number]] = True
        kept.append(mask)
    return kept


def _at_least(number: int, count: int, multiple: int) -> int:
    """So many units, rounded up to a multiple, of `count`."""
    return min(max(math.ceil(number / multiple), 1) * multiple, count)


def _apply(
    work: Work,
    step: Shrink,
    group: Group,
    kept: torch.Tensor,
    hessian: torch.Tensor | None,
    stage: Stage,
    names: Mapping[nn.Module, str],
) -> list[tuple[int, int]]:
    """Slices a group to the units that stay, bool [units]; returns the sizes that changed, from and to."""
    count, left = group.count, int(kept.sum())
    if left == count:
        none = "none of them is among the least of the model"
        none = none if step.scope == "model" else f"{step.ratio:.0%} of {count} {_unit(group)} is none"
        work.layers.append(_left(group, names, none))
        return []
    layers = [group.consumer, *(p.layer for p in group.producers)]
    before = [model_sizes(m).disk for m in layers]
    old = linear_weight(group.consumer).detach()
    reason = slice_group(group, kept, stage.block, stage.run)
    if reason is not None:
        work.layers.append(_left(group, names, reason))
        return []
    if step.repair and hessian is not None:
        weight = repaired(old, hessian, kept[group.inputs])
        stored = weight.t().contiguous() if is_conv1d(group.consumer) else weight
        set_linear(group.consumer, stored, linear_bias(group.consumer))
    for layer, size in zip(layers, before, strict=True):
        work.layers.append(
            LayerReport(
                name=names[layer],
                kind=type(layer).__name__,
                action=f"{left} of {count} {_unit(group)}",
                shape=tuple(linear_weight(layer).shape),
                bytes_before=size,
                bytes_after=model_sizes(layer).disk,
            )
        )
    width = old.shape[1] // count
    return [(count * f, left * f) for f in range(1, width + 1) if width % f == 0]


def _unit(group: Group) -> str:
    return "heads" if group.is_heads else "channels"


def _left(group: Group, names: Mapping[nn.Module, str], reason: str) -> LayerReport:
    layers: Iterable[nn.Module] = (group.consumer, *(p.layer for p in group.producers))
    return left_report(Skip(tuple(names[m] for m in layers), group.consumer, reason))


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Models of `transformers` with attention written out, where a number of heads that is wrong shows."""
    setter = getattr(model, "set_attn_implementation", None)
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if not callable(setter) or not isinstance(before, str) or before == "eager":
        yield
        return
    setter("eager")
    try:
        yield
    finally:
        setter(before)
