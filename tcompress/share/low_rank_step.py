"""The step that replaces linear layers by two thin ones."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from tcompress import calibrate
from tcompress.block_walk import collect, walk
from tcompress.match import Skip
from tcompress.nn.low_rank_linear import LowRankLinear
from tcompress.recipe import LowRank
from tcompress.share.low_rank import low_rank_factors, rank_for
from tcompress.statistics import InputStatistics
from tcompress.structure import carry
from tcompress.targeted import left_report, put, replaced_report, target_layers
from tcompress.transform import Work, transforms
from tcompress.weights import linear_bias, linear_weight, weight_key


@transforms(LowRank)
def run(work: Work, step: LowRank) -> None:
    """Replaces the targeted layers, block by block where data decide, so that each block makes up for those before."""
    layers, skips = target_layers(work.model, step)
    for module in [m for m in layers if rank_for(_shape(m), step.ratio) == 0]:
        reason = f"too small: no rank has {step.ratio:.0%} of its parameters"
        skips.append(Skip(layers.pop(module), module, reason))
    factors: dict[tuple[int, bool], tuple[nn.Parameter, nn.Parameter]] = {}
    if step.whitening == "none":
        _replace(work, step, layers, layers, {}, factors)
    elif layers:
        samples = work.data(step, "whitening 'inputs' decides by the inputs of layers")
        with calibrate.evaluating(work.model):
            for stage in walk(work.model, samples, list(layers), work.progress):
                _replace(work, step, layers, stage.modules, collect(stage, hessian=True), factors)
    work.layers += map(left_report, skips)
    if not layers:
        work.notes.append("low_rank: no layer was replaced")


def _shape(module: nn.Module) -> tuple[int, int]:
    n, k = linear_weight(module).shape
    return n, k


def _replace(
    work: Work,
    step: LowRank,
    names: dict[nn.Module, tuple[str, ...]],
    modules: Iterable[nn.Module],
    statistics: dict[tuple[int, bool], InputStatistics],
    factors: dict[tuple[int, bool], tuple[nn.Parameter, nn.Parameter]],
) -> None:
    replacements: dict[nn.Module, nn.Module] = {}
    for module in modules:
        key, found = weight_key(module), statistics.get(weight_key(module))
        if found is not None and found.count == 0:
            work.notes.append(f"{names[module][0]} has no calibration inputs: low rank by its weight alone")
            found = None
        if key not in factors:
            weight, hessian = linear_weight(module), None if found is None else found.hessian
            try:
                b, a = low_rank_factors(weight, rank_for(_shape(module), step.ratio), hessian)
            except ValueError as error:
                raise ValueError(f"compress: {names[module][0]}: {error}") from error
            factors[key] = nn.Parameter(b), nn.Parameter(a)
        bias = linear_bias(module)
        layer = LowRankLinear.from_factors(*factors[key], bias).train(module.training)
        replacements[module] = carry(module, layer)
        work.layers.append(replaced_report(names[module], module, layer, f"low rank {layer.rank}"))
    put(work.model, replacements)
