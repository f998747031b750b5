"""Recipes whose layers are pruned by different ratios: ranked together, or by what each costs on data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from tcompress import calibrate
from tcompress.block_walk import Stage, collect, walk
from tcompress.blocks import forward_replaced
from tcompress.errors import message
from tcompress.packing import Pattern
from tcompress.prune import magnitude_mask, sparsegpt, wanda_mask
from tcompress.prune.allocation import by_ranking, by_sensitivity
from tcompress.prune.magnitude import block_scores, check
from tcompress.recipe import Prune, Recipe
from tcompress.samples import Samples
from tcompress.statistics import InputStatistics
from tcompress.targeted import target_layers
from tcompress.weights import linear_weight, weight_key

_Key = tuple[int, bool]


def global_ratios(
    model: nn.Module,
    step: Prune | Mapping[str, Any],
    data: Any = None,
    most: float = 0.95,
    *,
    tokenizer: Callable[..., Mapping[str, Any]] | None = None,
    max_length: int | None = None,
) -> Recipe:
    """Ranks the weights (or blocks of them) of all layers together, and gives each layer its part of the lowest.

    The score is that of the step's algorithm: |w|, or |w|·√E[x²] for "wanda", which is also taken for "sparsegpt"; the
    inputs are those of the model as it is. Within a layer the algorithm then does as it always does.

    Args:
        model: as for `compress`; it is not changed.
        step: with the sparsity of all its layers together.
        data: as for `compress`; "wanda" and "sparsegpt" need it.
        most: no layer loses more than this.
        tokenizer, max_length: as for `compress`.

    Returns:
        A recipe with a step for each ratio; append what else is to be done.

    Raises:
        ValueError: no layer matches, the pattern is N:M, which leaves nothing to choose, or there are no data that can
            be used. TypeError: text without a tokenizer.
    """
    step = _checked(model, step, "global_ratios")
    layers = _by_weight(model, step)
    norms: dict[_Key, torch.Tensor] = {}
    if step.needs_data:
        samples = Samples(_given(data, step.algorithm), model, tokenizer, max_length).read("global_ratios")
        for stage in _stages(model, layers, samples):
            norms |= {key: s.norm / max(s.count, 1) ** 0.5 for key, s in collect(stage, hessian=False).items()}
    scores = {key: _scores(linear_weight(modules[0][0]), step, norms.get(key)) for key, modules in layers.items()}
    ratios = by_ranking(list(scores.values()), _sparsity(step), most)
    return _recipe(step, layers, dict(zip(scores, ratios, strict=True)))


def search_ratios(
    model: nn.Module,
    step: Prune | Mapping[str, Any],
    data: Any,
    ratios: Sequence[float] = (0.0, 0.2, 0.35, 0.5, 0.65, 0.8),
    sensitivity: Literal["layer", "output"] = "layer",
    *,
    tokenizer: Callable[..., Mapping[str, Any]] | None = None,
    max_length: int | None = None,
) -> Recipe:
    """Measures what each layer costs when it alone is pruned, and prunes more where that is little.

    Args:
        model: as for `compress`; it is not changed.
        step: with the sparsity of all its layers together, which is the budget.
        data: as for `compress`.
        ratios: at which each layer is measured, ascending from 0; the last is the most that one may lose.
        sensitivity: "layer": ‖(W - Ŵ) X‖² / ‖W X‖² of each layer, from one pass over the data; or "output": the same
            of the model's output with that layer pruned, for which the model runs once a layer and ratio.
        tokenizer, max_length: as for `compress`.

    Returns:
        A recipe with a step for each ratio that was chosen (`prune.allocation.by_sensitivity`).

    Raises:
        ValueError: as `global_ratios`, or the ratios do not reach the sparsity.
    """
    step = _checked(model, step, "search_ratios")
    if sensitivity not in ("layer", "output"):
        raise ValueError(message("search_ratios", "sensitivity", repr(sensitivity), "'layer' or 'output'"))
    layers = _by_weight(model, step)
    errors: dict[_Key, list[float]] = {}
    samples = Samples(_given(data, "search_ratios"), model, tokenizer, max_length).read("search_ratios")
    expected: list[torch.Tensor | None] = []
    if sensitivity == "output":
        with calibrate.evaluating(model):
            expected = [calibrate.output_tokens(model, sample) for sample in samples]
    for stage in _stages(model, layers, samples):
        for key, statistics in collect(stage, hessian=True).items():
            weight = linear_weight(layers[key][0][0]).detach()
            pruned = (_pruned(weight, statistics, step, ratio) for ratio in ratios)
            if sensitivity == "layer":
                assert statistics.hessian is not None
                errors[key] = [_layer_error(weight, w, statistics.hessian) for w in pruned]
            else:
                modules = [module for module, _ in layers[key]]
                errors[key] = [_output_error(model, modules, w, samples, expected) for w in pruned]
    sizes = [linear_weight(modules[0][0]).numel() for modules in layers.values()]
    found = by_sensitivity([errors[key] for key in layers], ratios, sizes, _sparsity(step))
    return _recipe(step, layers, dict(zip(layers, found, strict=True)))


def sparsities_by_magnitude(
    model: nn.Module, step: Prune, converted: Mapping[nn.Module, nn.Module]
) -> dict[_Key, float]:
    """Of `Prune.scope` "model": the sparsity of each layer that the step targets, by its weight."""
    layers: dict[_Key, nn.Module] = {}
    for module in target_layers(model, step, converted)[0]:
        layers.setdefault(weight_key(module), module)
    for module in layers.values():
        check(linear_weight(module), Pattern.parse(step.pattern), step.sparsity, "compress")
    scores = [_scores(linear_weight(module), step, None) for module in layers.values()]
    return dict(zip(layers, by_ranking(scores, _sparsity(step)), strict=True)) if layers else {}


def _checked(model: nn.Module, step: Prune | Mapping[str, Any], where: str) -> Prune:
    if not isinstance(step, Prune):
        loaded = Recipe.load({"steps": [{"step": "prune", **step}]}).steps[0]
        assert isinstance(loaded, Prune)
        step = loaded
    if Pattern.parse(step.pattern).kind == "n_m":
        raise ValueError(
            message(where, "step", step.pattern, "a pattern with a ratio", "N:M says what each layer loses")
        )
    if not target_layers(model, step)[0]:
        raise ValueError(
            message(where, "step", f"targets {list(step.targets)} that match nothing", "at least one layer")
        )
    return step


def _sparsity(step: Prune) -> float:
    assert step.sparsity is not None  # `Prune`: only N:M has none
    return step.sparsity


def _by_weight(model: nn.Module, step: Prune) -> dict[_Key, list[tuple[nn.Module, str]]]:
    """The targeted layers, those with one weight together, each with its first name."""
    found: dict[_Key, list[tuple[nn.Module, str]]] = {}
    for module, names in target_layers(model, step)[0].items():
        found.setdefault(weight_key(module), []).append((module, names[0]))
    return found


def _given(data: Any, where: str) -> Any:
    if data is None:
        raise ValueError(message(where, "data", "none", "calibration samples"))
    return data


def _stages(model: nn.Module, layers: Mapping[_Key, Any], samples: list[Any]) -> Iterable[Stage]:
    modules = [module for group in layers.values() for module, _ in group]
    with calibrate.evaluating(model):
        yield from walk(model, samples, modules)


def _scores(weight: torch.Tensor, step: Prune, norm: torch.Tensor | None) -> torch.Tensor:
    """[B] of a layer's blocks, or elements."""
    weight = weight.detach().float().abs()
    return block_scores(weight if norm is None else weight * norm, Pattern.parse(step.pattern).size).flatten()


def _pruned(weight: torch.Tensor, statistics: InputStatistics, step: Prune, ratio: float) -> torch.Tensor:
    if statistics.count and step.algorithm == "sparsegpt":
        return sparsegpt(weight, statistics, step.pattern, ratio).weight.to(weight.dtype)
    by_inputs = statistics.count > 0 and step.algorithm == "wanda"
    if by_inputs:
        mask = wanda_mask(weight, statistics, step.pattern, ratio)
    else:
        mask = magnitude_mask(weight, step.pattern, ratio)
    return weight.masked_fill(~mask, 0)


def _layer_error(weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor) -> float:
    w, gap = weight.float(), (weight - pruned).float()
    signal = float(((w @ hessian) * w).sum())
    return float(((gap @ hessian) * gap).sum()) / signal if signal > 0 else 0.0


def _output_error(
    model: nn.Module,
    modules: Sequence[nn.Module],
    weight: torch.Tensor,
    samples: Sequence[Any],
    expected: Sequence[torch.Tensor | None],
) -> float:
    noise = signal = 0.0
    for sample, output in zip(samples, expected, strict=True):
        got = _run_with(model, modules, weight, sample)
        if got is not None and output is not None:
            noise += float((got.float() - output.float()).square().sum())
            signal += float(output.float().square().sum())
    return noise / signal if signal > 0 else noise


def _run_with(model: nn.Module, modules: Sequence[nn.Module], weight: torch.Tensor, sample: Any) -> torch.Tensor | None:
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(forward_replaced(module, _linear(weight, module.bias)))
        return calibrate.output_tokens(model, sample)


def _linear(weight: torch.Tensor, bias: Any) -> Any:
    return lambda input: F.linear(input, weight, bias)


def _recipe(step: Prune, layers: Mapping[_Key, list[tuple[nn.Module, str]]], ratios: Mapping[_Key, float]) -> Recipe:
    """A step for each ratio; layers that lose nothing are in none."""
    by_ratio: dict[float, list[str]] = {}
    for key, ratio in ratios.items():
        if ratio > 0:
            by_ratio.setdefault(ratio, []).extend(f"re:{re.escape(name)}$" for _, name in layers[key])
    steps = [
        step.model_copy(update={"sparsity": ratio, "targets": tuple(names), "scope": "layer"})
        for ratio, names in sorted(by_ratio.items())
    ]
    if not steps:
        raise ValueError(message("search_ratios", "sparsity", step.sparsity, "more than nothing"))
    return Recipe(steps=tuple(steps))
