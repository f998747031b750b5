"""Mixed precision: which scheme each layer gets, by what its quantization costs on the user's data and a budget."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from tcompress import timing
from tcompress.blocks import forward_replaced
from tcompress.budget import Candidate, choose_within, choose_within_loss
from tcompress.calibrate import evaluating, first_tensor, output_tokens, run
from tcompress.errors import message
from tcompress.match import Match, match
from tcompress.nn import QuantizedLinear
from tcompress.nn.kernel_layout import KernelWeight
from tcompress.padding import Masks, counted, token_masks
from tcompress.quantize import SCHEMES, Scheme
from tcompress.recipe import Quantize, Recipe
from tcompress.report.size import model_sizes
from tcompress.samples import Samples
from tcompress.solve_layer import integers
from tcompress.weights import linear_bias, linear_weight, weight_key

#: The name of the choice to leave a layer in floating point.
FLOAT = "float"


@dataclass(frozen=True)
class LayerChoice:
    """What was measured of a layer, and what was chosen for it.

    Attributes:
        name: path in the model.
        chosen: a scheme's name, or "float".
        candidates: by name, with cost and loss: those of layers with one weight together.
        aliases: paths of the other layers that have this one's weight, for which the same was chosen.
    """

    name: str
    chosen: str
    candidates: Mapping[str, Candidate]
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class MixedPrecision:
    """The recipe, and how it came about.

    Attributes:
        recipe: for `compress`: one step a scheme, whose targets are the layers by name.
        layers: in the order of the model.
        cost: of all choices, in the budget's unit. loss: the sum of their losses.
    """

    recipe: Recipe
    layers: tuple[LayerChoice, ...]
    cost: float
    loss: float


def mixed_precision(
    model: nn.Module,
    data: Any,
    *,
    size_mb: float | None = None,
    bits_per_weight: float | None = None,
    latency_ms: float | None = None,
    max_loss: float | None = None,
    schemes: Sequence[str] = ("W4A16-g32", "W8A8", FLOAT),
    algorithm: Literal["rtn", "hqq", "gptq"] = "rtn",
    measure: Literal["model", "layer"] = "model",
    tokens: int = 128,
    targets: Sequence[str] = ("Linear", "Conv1D"),
    ignore: Sequence[str] = ("lm_head",),
    tokenizer: Any = None,
    max_length: int | None = None,
) -> MixedPrecision:
    """A recipe that spends a budget on the layers that need it.

    Each layer is quantized by itself with each scheme, rounded to nearest, and the loss on the data is measured; losses
    are taken to add up (as in Dong et al., "HAWQ-V2", arXiv 1911.03852, section 3.2, with measured losses in place of
    traces). Then the sum of the losses is minimised under the budget (`budget.choose_within`). Schemes with quantized
    activations are measured with these.

    Args:
        data: as for `compress`; every sample is run once for each layer and scheme, so a few are enough.
        size_mb: budget: of the layers' stored weights and biases together, in 10⁶ bytes.
        bits_per_weight: budget: the same for each weight, scales included: 4.5 are 4 bits in groups of 32.
        latency_ms: budget: time of the layers one after the other for `tokens` tokens, measured on this machine.
        max_loss: budget: instead, the smallest size whose summed loss is at most this.
        schemes: the candidates; "float" leaves a layer as it is.
        algorithm: of the recipe's steps.
        measure: "model": mean KL divergence of the softmax of the model's first output where that is one over
            a vocabulary (`logits`), else its relative squared error. "layer": the relative squared error of the layer's
            own output, all layers in one pass for each scheme: quicker, and blind to which layers matter more.
        targets, ignore: as in `recipe.Quantize`.
        tokenizer, max_length: as for `compress`.

    Returns:
        The recipe with the table it was chosen by.

    Raises:
        ValueError: none or several budgets, one that the cheapest candidates exceed, an unknown scheme, a model without
            a layer to quantize, or data that cannot be used.
    """
    budgets = {"size_mb": size_mb, "bits_per_weight": bits_per_weight, "latency_ms": latency_ms, "max_loss": max_loss}
    given = {name: value for name, value in budgets.items() if value is not None}
    if len(given) != 1:
        raise ValueError(message("mixed_precision", "budget", sorted(given) or "none", f"one of {sorted(budgets)}"))
    ((kind, budget),) = given.items()
    named = {name: None if name == FLOAT else Scheme.named(name) for name in schemes}
    static = [name for name, scheme in named.items() if scheme is not None and scheme.static]
    if static:
        raise ValueError(message("mixed_precision", "schemes", static, "dynamic activations"))
    any_scheme = next(s for s in [*named.values(), SCHEMES["W8A8"]] if s)
    step = _step(any_scheme, targets=tuple(targets), ignore=tuple(ignore))
    matches = [m for m in match(model, Recipe(steps=(step,)))[0] if not isinstance(m.module, nn.Embedding)]
    samples = Samples(data, model, tokenizer, max_length).read("mixed_precision")
    table: list[dict[str, Candidate]] = []
    groups = _by_weight(matches)
    losses = _losses(model, groups, named, samples, measure)
    for group, of_layer in zip(groups, losses, strict=True):
        layers = {name: _quantized(group, scheme) for name, scheme in named.items()}
        costs = _latencies(layers, tokens, linear_weight(group[0].module)) if kind == "latency_ms" else _sizes(layers)
        table.append({name: Candidate(costs[name], of_layer[name]) for name in layers})
    weights = sum(linear_weight(group[0].module).numel() for group in groups)
    if kind == "bits_per_weight":
        budget = budget * weights / 8
    elif kind == "size_mb":
        budget = budget * 1e6
    choose = choose_within_loss if kind == "max_loss" else choose_within
    chosen = choose(table, budget, f"mixed_precision: {kind}")
    total = sum(options[name].cost for options, name in zip(table, chosen, strict=True))
    if kind in ("size_mb", "max_loss"):
        total /= 1e6
    elif kind == "bits_per_weight":
        total *= 8 / weights
    paths = [[m.names[0] for m in group] for group in groups]
    choices = tuple(LayerChoice(p[0], c, t, tuple(p[1:])) for p, c, t in zip(paths, chosen, table, strict=True))
    loss = sum(options[name].loss for options, name in zip(table, chosen, strict=True))
    return MixedPrecision(_recipe(choices, named, algorithm), choices, total, loss)


def _recipe(choices: Sequence[LayerChoice], named: Mapping[str, Scheme | None], algorithm: str) -> Recipe:
    steps = []
    for name, scheme in named.items():
        paths = [path for choice in choices if choice.chosen == name for path in (choice.name, *choice.aliases)]
        own = tuple(f"re:{re.escape(path)}$" for path in paths)
        if scheme is not None and own:
            steps.append(_step(scheme, algorithm=algorithm, targets=own))
    if not steps:
        hint = "a larger budget than the floats need; use schemes without 'float'"
        raise ValueError(message("mixed_precision", "budget", "one in which no layer is quantized", "less", hint))
    return Recipe(steps=tuple(steps))


def _step(scheme: Scheme, **fields: Any) -> Quantize:
    return Quantize.model_validate({"scheme": scheme, **fields})


def _by_weight(matches: Sequence[Match]) -> list[list[Match]]:
    """Layers with one weight together: two schemes would make two weights of it."""
    groups: dict[tuple[int, bool], list[Match]] = {}
    for m in matches:
        groups.setdefault(weight_key(m.module), []).append(m)
    return list(groups.values())


def _quantized(group: Sequence[Match], scheme: Scheme | None) -> list[nn.Module]:
    """The layers of one weight under a scheme, rounded to nearest."""
    if scheme is None:
        return [m.module for m in group]
    packed = integers(linear_weight(group[0].module).detach(), _step(scheme))
    layers: list[nn.Module] = []
    kernel: KernelWeight | None = None
    for m in group:
        layer = QuantizedLinear.from_packed(packed, linear_bias(m.module), scheme, kernel=kernel).eval()
        kernel = layer.held_kernel
        layers.append(layer)
    return layers


def _sizes(layers: Mapping[str, Sequence[nn.Module]]) -> dict[str, float]:
    return {name: float(model_sizes(nn.ModuleList(modules)).disk) for name, modules in layers.items()}


def _latencies(layers: Mapping[str, Sequence[nn.Module]], tokens: int, weight: torch.Tensor) -> dict[str, float]:
    """Milliseconds for a call of each."""
    x = torch.randn(tokens, weight.shape[1], device=weight.device).to(weight.dtype)
    calls = [lambda modules=modules: [module(x) for module in modules] for modules in layers.values()]
    with torch.no_grad():
        times = timing.alternate(calls, 0.1)
    return {name: 1e3 * t.median for name, t in zip(layers, times, strict=True)}


def _losses(
    model: nn.Module,
    groups: Sequence[Sequence[Match]],
    named: Mapping[str, Scheme | None],
    samples: Sequence[Any],
    measure: str,
) -> list[dict[str, float]]:
    """Of each layer, or layers with one weight, the mean loss over the samples by scheme."""
    losses = [dict.fromkeys(named, 0.0) for _ in groups]
    with evaluating(model):
        if measure == "layer":
            for name, scheme in named.items():
                if scheme is not None:
                    for i, loss in enumerate(_layer_losses(model, groups, scheme, samples)):
                        losses[i][name] = loss
            return losses
        expected = [output_tokens(model, sample) for sample in samples]
        for i, group in enumerate(groups):
            for name, scheme in named.items():
                if scheme is None:
                    continue
                with ExitStack() as stack:
                    for m, layer in zip(group, _quantized(group, scheme), strict=True):
                        stack.enter_context(forward_replaced(m.module, layer.forward))
                    for sample, target in zip(samples, expected, strict=True):
                        output = run(model, sample)
                        losses[i][name] += _distance(output, token_masks(model, sample), target) / len(samples)
    return losses


def _distance(output: Any, masks: Masks, expected: torch.Tensor | None) -> float:
    got = first_tensor(output)
    if got is None or expected is None:
        raise ValueError(message("mixed_precision", "model", "no float tensor returned", "one", 'measure="layer"'))
    is_distribution = getattr(output, "logits", None) is got
    got = counted(got, masks)
    if is_distribution:
        p, q = expected.double().log_softmax(-1), got.double().log_softmax(-1)
        return float(F.kl_div(q, p, log_target=True, reduction="sum")) / max(p[..., 0].numel(), 1)
    return float((got.double() - expected.double()).square().sum() / expected.double().square().sum())


def _layer_losses(
    model: nn.Module, groups: Sequence[Sequence[Match]], scheme: Scheme, samples: Sequence[Any]
) -> list[float]:
    noise, signal = [0.0] * len(groups), [0.0] * len(groups)
    with ExitStack() as stack:
        layers = [(i, *pair) for i, g in enumerate(groups) for pair in zip(g, _quantized(g, scheme), strict=True)]
        for i, m, replacement in layers:

            def compare(
                module: nn.Module, args: Any, kwargs: Any, output: Any, i: int = i, new: nn.Module = replacement
            ) -> None:
                got, expected = (counted(y).double() for y in (new(*args, **kwargs), output))
                noise[i] += float((got - expected).square().sum())
                signal[i] += float(expected.square().sum())

            stack.callback(m.module.register_forward_hook(compare, with_kwargs=True).remove)
        for sample in samples:
            run(model, sample)
    return [n / s if s else 0.0 for n, s in zip(noise, signal, strict=True)]
