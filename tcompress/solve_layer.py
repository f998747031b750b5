"""Solves one linear layer: what is pruned, the integers of what stays, and what makes up for the rest."""

from __future__ import annotations

import torch
from torch import nn

from tcompress.layer_job import Job, Solution
from tcompress.packing import PackedWeight
from tcompress.prune import magnitude_mask, sparsegpt, wanda_mask
from tcompress.quantize import gptq, hqq, round_to_nearest
from tcompress.quantize.bias_correction import corrected_bias
from tcompress.quantize.error_propagation import propagated_weight
from tcompress.recipe import Quantize
from tcompress.statistics import InputStatistics
from tcompress.weights import linear_bias, linear_weight


def integers(weight: torch.Tensor, step: Quantize, statistics: InputStatistics | None = None) -> PackedWeight:
    """The integers of a weight [N, K] by a step's algorithm; by rounding to nearest where that needs statistics and
    there are none."""
    assert step.scheme is not None
    args = step.scheme.weights
    if step.algorithm == "hqq":
        return hqq(weight, args)
    wants = step.algorithm in ("gptq", "autoround")  # the latter where there is no block to learn by
    if wants and statistics is not None and statistics.hessian is not None:
        return gptq(weight, statistics, args, range=step.range or "mse", sweeps=step.sweeps or 0)
    importance = None if statistics is None else statistics.mean_square
    return round_to_nearest(weight, args, range=step.range or "minmax", importance=importance)


def solve_layer(job: Job, statistics: InputStatistics | None) -> Solution:
    """What becomes of a layer; without statistics by magnitude and rounding to nearest."""
    weight, mask = pruned_weight(job, statistics)
    if job.quantize is None or job.args is None:
        return Solution(weight.to(linear_weight(job.module).dtype), mask, None)
    outliers = outlier_inputs(job, statistics)
    rest = weight if outliers is None else weight.index_fill(1, outliers, 0)
    if job.needs_original and statistics is not None and statistics.shift is not None:
        assert job.quantize.propagation is not None
        # What was pruned before stays zero.
        rest = propagated_weight(rest, statistics, job.quantize.propagation).masked_fill(rest == 0, 0)
        if outliers is not None:
            rest = rest.index_fill(1, outliers, 0)
    packed = integers(rest, job.quantize, statistics)
    computed = packed.dequantize()
    if outliers is not None:
        computed[:, outliers] = weight[:, outliers].float()
    return Solution(computed, mask, packed, _bias(job, weight, computed, statistics), outliers)


def pruned_weight(job: Job, statistics: InputStatistics | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight [N, K] with what stays of it, and the mask."""
    weight = linear_weight(job.module).detach()
    if job.pruned is None:
        return weight, None
    step, mask = job.pruned.step, job.pruned.mask
    if statistics is not None and step.algorithm == "sparsegpt":
        found = sparsegpt(weight, statistics, step.pattern, step.sparsity)
        return found.weight, found.mask
    if statistics is not None and step.algorithm == "wanda":
        mask = wanda_mask(weight, statistics, step.pattern, step.sparsity)
    elif mask is None:
        mask = magnitude_mask(weight, step.pattern, step.sparsity)
    return weight.masked_fill(~mask, 0), mask


def outlier_inputs(job: Job, statistics: InputStatistics | None) -> torch.Tensor | None:
    """The inputs that are larger than most of the layer's by the step's factor, or None where there are none.

    LLM.int8 (section 3.2) has one threshold, 6, for all layers of its models. In a model of 135 M parameters that takes
    one input of the projections to Q, K and V, and four of five of a projection down: here sizes are relative.
    """
    factor = None if job.quantize is None else job.quantize.outliers
    if factor is None or statistics is None:
        return None
    found = (statistics.max_abs > factor * statistics.max_abs.median()).nonzero()[:, 0]
    return found if found.numel() else None


def _bias(
    job: Job, weight: torch.Tensor, computed: torch.Tensor, statistics: InputStatistics | None
) -> torch.Tensor | None:
    bias = linear_bias(job.module)
    if job.quantize is None or not job.quantize.bias_correction or statistics is None or bias is None:
        return None
    # What pruning changed is made up for too.
    return corrected_bias(bias, linear_weight(job.module).detach(), computed, statistics)


def stand_in(module: nn.Module, solution: Solution) -> torch.nn.Linear:
    """A linear layer in floating point that computes what the solution will."""
    weight = solution.weight.to(linear_weight(module).dtype)
    bias = linear_bias(module) if solution.bias is None else solution.bias
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer
