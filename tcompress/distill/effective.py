"""Layers that compute with something made of their weights, while they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.blocks import forward_replaced
from tcompress.weights import linear_weight

TensorMap = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class Effective:
    """What a linear layer or an embedding computes with.

    Attributes:
        weight: maps, one after the other, from the weight [N, K] to the one that is multiplied by.
        input: a map of a linear layer's input [..., K], or None.
        bias: [N], in place of its own, or None.
    """

    weight: list[TensorMap] = field(default_factory=list)
    input: TensorMap | None = None
    bias: torch.Tensor | None = None

    def weight_of(self, module: nn.Module) -> torch.Tensor:
        """[N, K], as it is multiplied by."""
        weight = linear_weight(module)
        for map_ in self.weight:
            weight = map_(weight)
        return weight


@contextmanager
def computing_with(layers: Mapping[nn.Module, Effective]) -> Iterator[None]:
    """Lets the layers compute that way for a while. Their parameters, and so their state dicts, stay what they are."""
    with ExitStack() as stack:
        for module, effective in layers.items():
            stack.enter_context(forward_replaced(module, _forward(module, effective)))
        yield


def _forward(module: nn.Module, effective: Effective) -> Any:
    if isinstance(module, nn.Embedding):

        def look_up(input: torch.Tensor) -> torch.Tensor:
            return F.embedding(input, effective.weight_of(module), module.padding_idx)

        return look_up

    def linear(input: torch.Tensor) -> torch.Tensor:
        x = input if effective.input is None else effective.input(input)
        bias: Any = module.bias if effective.bias is None else effective.bias
        return F.linear(x, effective.weight_of(module), bias)

    return linear


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


def straight_through(x: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """`value`, bit for bit, with the gradient of x: the straight-through estimator of Bengio et al., "Estimating or
    Propagating Gradients Through Stochastic Neurons for Conditional Computation", arXiv 1308.3432, section "Straight-
    Through Estimator". (x + (value - x) would be rounded.)
    """
    result: torch.Tensor = _StraightThrough.apply(x, value)
    return result
