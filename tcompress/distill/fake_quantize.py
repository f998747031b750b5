"""Quantization that is simulated in training, so that the weights learn to live with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from tcompress.distill.effective import Effective, TensorMap, straight_through
from tcompress.match import Match, match
from tcompress.ops.quantize_per_token import quantize
from tcompress.ops.quantize_static import quantize_static
from tcompress.quantize import QuantArgs, round_to_nearest
from tcompress.quantize.observers import InputScale
from tcompress.quantize.range_search import Range
from tcompress.recipe import Quantize, Recipe, Sparse


def fake_quantize_weight(weight: torch.Tensor, args: QuantArgs, range: Range = "minmax") -> torch.Tensor:
    """What the integers of a weight [N, K] stand for, bit for bit, with the weight's own gradient; Jacob et al.,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877,
    section 3, with the straight-through estimator and the grid of `round_to_nearest`, found anew at each step. With
    "minmax" the grid spans all weights; what another range clips keeps its gradient too.

    Raises:
        ValueError: as `round_to_nearest`.
    """
    return straight_through(weight, round_to_nearest(weight.detach(), args, range=range).dequantize(weight.dtype))


def fake_quantize_input(
    x: torch.Tensor, args: QuantArgs, fixed: InputScale | None = None, outliers: torch.Tensor | None = None
) -> torch.Tensor:
    """The same for a layer's input [..., K], by `ops.quantize_per_token`, the quantization that its kernels apply,
    or by a scale that data fixed: what that clips keeps its gradient too.

    Args:
        outliers: int64 [C], columns that stay as they are, and have no part in a token's scale (`nn.OutlierLinear`).
    """
    if outliers is not None:
        rest = fake_quantize_input(x.index_fill(-1, outliers, 0), args, fixed)
        return rest.index_copy(-1, outliers, x.index_select(-1, outliers))
    if fixed is None:
        q, scale, zero_point = quantize(x.detach(), args.bits, args.symmetric)
    else:
        scale = torch.tensor(fixed.scale, device=x.device)
        zero = fixed.zero_point
        held = None if zero is None else torch.tensor(zero, dtype=torch.int32, device=x.device)
        q, scale, zero_point = quantize_static(x.detach(), scale, held, args.bits, args.symmetric)
    return straight_through(x, ((q - zero_point) * scale).to(x.dtype))


def simulated(model: nn.Module, recipe: Recipe) -> tuple[dict[nn.Module, Effective], list[str]]:
    """How the layers compute that a recipe's steps quantize, and what there is to report.

    `Quantize` and `Sparse` steps with a scheme are simulated, wherever they stand in the recipe, each in the layers
    that it would replace. Attention stays in floating point.
    """
    steps = tuple(s for s in recipe.steps if isinstance(s, Quantize | Sparse) and s.scheme is not None)
    if not steps:
        return {}, []
    matches, _ = match(model, recipe.model_copy(update={"steps": steps}), required=False)
    quantized = [m.step for m in matches if isinstance(m.step, Quantize)]
    notes = []
    others = sorted({step.algorithm for step in quantized if step.algorithm} - {"rtn"})
    if others:
        notes.append(f"training simulated rounding to nearest; {', '.join(others)} then gave other integers")
    by_data = [name for name in ("bias_correction", "outliers") if any(getattr(step, name) for step in quantized)]
    if any(step.algorithm == "rtn" and step.range == "mse" for step in quantized) and any(
        isinstance(step, Quantize) and step.needs_data for step in steps
    ):  # then there are statistics, by which the search of a range weighs errors
        by_data.append("the inputs' weight in range mse")
    if any(step.scheme is not None and step.scheme.static for step in steps):
        notes.append("training simulated a scale for each token; data then fixed one for all")
    if by_data:
        notes.append(f"training did not simulate {', '.join(by_data)}, which data decide afterwards")
    return {m.module: _effective(m) for m in matches if m.scheme is not None}, notes


def _effective(m: Match) -> Effective:
    assert m.scheme is not None
    # The range of GPTQ's grid stands for integers that are not simulated: its search would cost time for nothing.
    range_ = m.step.range if isinstance(m.step, Quantize) and m.step.algorithm == "rtn" else None
    maps: Sequence[TensorMap] = [partial(fake_quantize_weight, args=m.scheme.weights, range=range_ or "minmax")]
    activations = m.scheme.activations
    if activations is None:
        return Effective(list(maps))
    return Effective(list(maps), partial(fake_quantize_input, args=activations))
