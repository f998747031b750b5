"""The scales of static activations: one for the inputs of a layer, fixed by calibration data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tcompress.calibrate import evaluating, run
from tcompress.errors import message
from tcompress.match import Match
from tcompress.match_attention import holding
from tcompress.padding import counted
from tcompress.quantize.observers import InputScale, Observer, observer
from tcompress.recipe import Quantize


def has_static(matches: Sequence[Match]) -> bool:
    """Whether a layer's activations are to be static."""
    return any(_is_static(m) for m in matches)


def no_samples(where: str, matches: Sequence[Match]) -> ValueError:
    """The error of the function `where` that static activations have nothing to be fixed by."""
    scheme = next(m.step.scheme for m in matches if _is_static(m))
    assert scheme is not None
    hint = f"{scheme.name} has scales that data fix; {scheme.with_dynamic_activations().name} needs none"
    return ValueError(message(where, "data", "none", "calibration samples", hint))


def with_input_scales(
    model: nn.Module,
    matches: Sequence[Match],
    converted: Mapping[nn.Module, nn.Module],
    samples: Sequence[Any] | None,
) -> tuple[list[Match], list[str]]:
    """The matches, those with a static scheme with what quantizes their inputs; and what there is to report.

    One pass over the samples with the model as it is. Padding is not observed (`padding`), nor are NaN and infinity,
    nor inputs that stay in floating point (`Quantize.outliers`). Layers with one input get one scale, for they see the
    same. A layer that is never called, or whose inputs are all zero, has no range: its activations stay dynamic.

    Args:
        converted: modules that stand in for others (attention whose projections are layers), as for `solve`.

    Raises:
        ValueError: a static scheme, and no samples.
    """
    static = [m for m in matches if _is_static(m)]
    if not static:
        return list(matches), []
    if samples is None:
        raise no_samples("compress", static)
    observers = _observed(model, static, converted, samples)
    found: list[Match] = []
    notes: list[str] = []
    for m in matches:
        if m.module not in observers:
            found.append(m)
            continue
        name, seen = m.names[0] or "(root)", observers[m.module]
        scale = _scale(m, seen)
        found.append(replace(m, input_scale=scale))
        if scale is None:
            notes.append(f"{name} has no calibration inputs other than zero: its activations stay dynamic")
        if seen.left_out:
            notes.append(f"{name}: {seen.left_out} input values left out of its scale: NaN or infinity")
    return found, notes


def _is_static(m: Match) -> bool:
    return m.step.scheme is not None and m.step.scheme.static and not isinstance(m.module, nn.Embedding)


def _observed(
    model: nn.Module, static: Sequence[Match], converted: Mapping[nn.Module, nn.Module], samples: Sequence[Any]
) -> dict[nn.Module, Observer]:
    observers: dict[nn.Module, Observer] = {}
    with evaluating(model), ExitStack() as stack:
        stack.enter_context(holding(model, converted))
        for module in converted.values():
            stack.enter_context(evaluating(module))
        for m in static:
            assert isinstance(m.step, Quantize)
            assert m.step.observer is not None
            assert m.step.scheme is not None
            args = m.step.scheme.activations
            assert args is not None
            observers[m.module] = observer(m.step.observer, args.bits, args.symmetric)
            hook = _hook(observers[m.module], m.outliers)
            stack.callback(m.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for sample in samples:
            run(model, sample)
    return observers


def _hook(seen: Observer, outliers: torch.Tensor | None) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = counted((args[0] if args else next(iter(kwargs.values()))).detach())
        seen.observe(x if outliers is None else x.index_fill(-1, outliers, 0))

    return hook


def _scale(m: Match, seen: Observer) -> InputScale | None:
    assert m.step.scheme is not None
    args = m.step.scheme.activations
    assert args is not None
    if not seen.count:
        return None
    lo, hi = seen.range()
    if lo == hi:  # zero, which each range includes
        return None
    scale, zero_point = seen.scale(args.bits, args.symmetric)
    return InputScale(scale, None if args.symmetric else zero_point, lo, hi)
