"""Quantization that is simulated in training, so that the weights learn to live with it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from tcompress.distill.effective import Effective, TensorMap, straight_through
from tcompress.match import Match, match
from tcompress.ops.quantize_per_token import quantize
from tcompress.quantize import QuantArgs, round_to_nearest
from tcompress.recipe import Quantize, Recipe, Sparse


def fake_quantize_weight(weight: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """What the integers of a weight [N, K] stand for, bit for bit, with the weight's own gradient; Jacob et al.,
    "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv 1712.05877,
    section 3, with the straight-through estimator and the grid of `round_to_nearest`, found anew at each step. The grid
    spans all weights: none is clipped, so that each has a gradient.

    Raises:
        ValueError: as `round_to_nearest`.
    """
    return straight_through(weight, round_to_nearest(weight.detach(), args).dequantize(weight.dtype))


def fake_quantize_input(x: torch.Tensor, args: QuantArgs) -> torch.Tensor:
    """The same for a layer's input [..., K], by `ops.quantize_per_token`, the quantization that its kernels apply."""
    q, scale, zero_point = quantize(x.detach(), args.bits, args.symmetric)
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
    notes = []
    algorithms = sorted({m.step.algorithm for m in matches if isinstance(m.step, Quantize) and m.step.algorithm})
    others = [name for name in algorithms if name != "rtn"]
    if others:
        notes.append(f"training simulated rounding to nearest; {', '.join(others)} then gave other integers")
    return {m.module: _effective(m) for m in matches if m.scheme is not None}, notes


def _effective(m: Match) -> Effective:
    assert m.scheme is not None
    maps: Sequence[TensorMap] = [partial(fake_quantize_weight, args=m.scheme.weights)]
    activations = m.scheme.activations
    if activations is None:
        return Effective(list(maps))
    return Effective(list(maps), partial(fake_quantize_input, args=activations))
