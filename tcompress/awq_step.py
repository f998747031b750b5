"""Runs the step that scales weights by the size of their inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import nn

from tcompress import memory
from tcompress.block_places import find_places
from tcompress.blocks import BlockRunner
from tcompress.calibrate import evaluating, run
from tcompress.collect import Key
from tcompress.pair_inputs import Target, collect_readers, report, targets_of
from tcompress.pairs import fold
from tcompress.pairs.fold import reader_scales, source_values
from tcompress.quantize.awq import RATIOS, awq_scales, weight_error
from tcompress.recipe import AWQ
from tcompress.statistics import InputStatistics
from tcompress.transform import Work, transforms
from tcompress.weights import linear_weight, weight_key


@transforms(AWQ)
def awq(work: Work, step: AWQ) -> None:
    """Finds the pairs, goes through the model block by block, and folds each pair's best scales.

    One block's Hessians are in memory at a time. All errors are measured on the weights as they were.
    """
    samples = work.data(step, "scales are decided by the inputs of layers")
    targets = targets_of(work, step, samples[0], scheme_needed=True)
    model, found = work.model, []
    with evaluating(model):
        found_places = find_places(model, samples[0], {m: None for t in targets for m in t.schemes})
        chains, owner = found_places.chains, found_places.owner
        runner = BlockRunner(model, chains, samples)
        stages = [(c, b) for c, chain in enumerate(chains) for b in range(len(chain))]
        places = {t: {owner.get(m) for m in t.schemes} for t in targets}
        for stage in track(stages, "scaling", disable=not work.progress, transient=True):
            own = [t for t in targets if places[t] == {stage}]
            inputs = collect_readers(own, partial(runner.run, *stage, False), hessian=True)
            runner.run(*stage, keep=True)
            found += [(target, *_scales(target, inputs)) for target in own]
            del inputs
            memory.trim()
        outside = [t for t in targets if places[t] == {None}], runner.run_rest
        across = [t for t in targets if len(places[t]) > 1], partial(_run_all, model, samples)
        for own, run_them in (outside, across):
            inputs = collect_readers(own, run_them, hessian=True) if own else {}
            found += [(target, *_scales(target, inputs)) for target in own]
    for target, scales, what in found:
        if scales is not None:
            fold(target.pair, scales)
            work.layers.append(report(target, "awq", what))
    kept = sum(scales is None for _, scales, _ in found)
    if kept:
        work.notes.append(f"awq: no scales reduce the error of {kept} of {len(found)} pairs, which stay as they are")


def _run_all(model: nn.Module, samples: Sequence[Any]) -> None:
    for sample in samples:
        run(model, sample)


@torch.no_grad()
def _scales(target: Target, inputs: Mapping[Key, InputStatistics]) -> tuple[torch.Tensor | None, str]:
    """The scales [N] by which a pair's source is divided, or None, and what to say of them."""
    pair = target.pair
    consumers = [c for c in pair.consumers if c.module in target.schemes]
    means, layers = [], []
    for c in consumers:
        statistics, scheme = inputs.get(weight_key(c.module)), target.schemes[c.module]
        if statistics is None or statistics.count == 0:
            return None, ""
        assert statistics.hessian is not None
        assert scheme is not None
        means.append(source_values(statistics.mean_abs, c, pair.size))
        layers.append((c, linear_weight(c.module), statistics.hessian, scheme.weights))
    mean = torch.stack(means).amax(0)
    errors = []
    for i in range(RATIOS):
        scales = awq_scales(mean, i / RATIOS) if i else None
        errors.append(
            sum(
                weight_error(weight, hessian, None if scales is None else reader_scales(scales, c), args)
                for c, weight, hessian, args in layers
            )
        )
    best = min(range(RATIOS), key=errors.__getitem__)
    if best == 0:
        return None, ""
    change = errors[best] / errors[0] - 1
    return awq_scales(mean, best / RATIOS), f"ratio {best / RATIOS:g}, squared output error {change:+.0%}"
