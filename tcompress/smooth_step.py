"""Runs the step that moves the size of activations into weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tcompress.calibrate import evaluating, run
from tcompress.collect import Key, RowStatistics
from tcompress.pair_inputs import Target, collect_readers, report, targets_of
from tcompress.pairs import fold
from tcompress.pairs.fold import reader_scales, source_values
from tcompress.quantize.smoothquant import ALPHAS, best_alpha, output_error, smooth_scales
from tcompress.recipe import Smooth
from tcompress.statistics import InputStatistics
from tcompress.transform import Work, transforms
from tcompress.weights import linear_weight, weight_key

#: Inputs of each layer by which "auto" compares exponents.
_ROWS = 256


@transforms(Smooth)
def smooth(work: Work, step: Smooth) -> None:
    """Finds the pairs, measures what their readers are given, and folds the scales.

    The maxima are those of the model as it is; since it computes the same afterwards, the order of pairs is of no
    matter, except that a reader that is another pair's source has its weight measured before that scales its rows.
    """
    samples = work.data(step, "scales are decided by the inputs of layers")
    auto = step.alpha == "auto"
    targets = targets_of(work, step, samples[0], scheme_needed=auto)

    def run_all() -> None:
        for sample in samples:
            run(work.model, sample)

    with evaluating(work.model):
        rows = -(-_ROWS // max(len(samples), 1)) if auto else 0
        inputs = collect_readers(targets, run_all, hessian=False, rows=rows)
        found = [(target, *_scales(target, step, inputs)) for target in targets]
        for target, scales, what in found:
            if scales is not None:
                fold(target.pair, scales)
                work.layers.append(report(target, "smooth", what))
    kept = sum(scales is None for _, scales, _ in found)
    if kept:
        work.notes.append(f"smooth: no scales reduce the error of {kept} of {len(found)} pairs, which stay as they are")


@torch.no_grad()
def _scales(target: Target, step: Smooth, inputs: Mapping[Key, InputStatistics]) -> tuple[torch.Tensor | None, str]:
    """The scales [N] by which a pair's source is divided, or None, and what to say of them."""
    pair = target.pair
    consumers = [c for c in pair.consumers if c.module in target.schemes]
    maxima = []
    for c in consumers:
        statistics = inputs.get(weight_key(c.module))
        if statistics is None or statistics.count == 0:
            return None, ""
        weight = linear_weight(c.module).float().abs().amax(0)
        maxima.append([source_values(v, c, pair.size) for v in (statistics.max_abs.to(weight.device), weight)])
    x, w = (torch.stack(values).amax(0) for values in zip(*maxima, strict=True))
    if step.alpha != "auto":
        return smooth_scales(x, w, step.alpha), f"alpha {step.alpha:g}"
    errors = []
    for scales in [None, *(smooth_scales(x, w, alpha) for alpha in ALPHAS)]:
        total = 0.0
        for c in consumers:
            own = None if scales is None else reader_scales(scales, c)
            scheme = target.schemes[c.module]
            assert scheme is not None
            seen = inputs[weight_key(c.module)]
            assert isinstance(seen, RowStatistics)
            total += output_error(seen.rows, linear_weight(c.module), own, scheme)
        errors.append(total)
    unscaled, *errors = errors
    alpha = best_alpha(errors, unscaled)
    if alpha is None:
        return None, ""
    change = errors[ALPHAS.index(alpha)] / unscaled - 1
    return smooth_scales(x, w, alpha), f"alpha {alpha:g}, squared output error {change:+.0%}"
