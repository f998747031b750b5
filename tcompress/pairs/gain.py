"""Recognises by trying which modules multiply each channel by a weight at their end: norms of any class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.func import functional_call

#: How the weight w acts: y = f(x) * w, or y = f(x) * (1 + w) as in Gemma; biases are scaled along.
Gain = Literal["weight", "one_plus"]


def may_have_gain(module: nn.Module) -> bool:
    """Whether a module's parameters are a vector "weight" and perhaps a "bias" like it, and it has no children."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or not weight.is_floating_point() or weight.device.type == "meta":
        return False
    others = {name: p for name, p in module._parameters.items() if p is not None and name != "weight"}
    if any(name != "bias" or p.shape != weight.shape for name, p in others.items()):
        return False
    return next(module.children(), None) is None


def gain_of(module: nn.Module, x: torch.Tensor) -> Gain | None:
    """How the module's weight scales its output, tried on inputs x [R, C] by scales of powers of two; None if it does
    not."""
    weight = module._parameters["weight"]
    bias = module._parameters.get("bias")
    assert weight is not None
    if x.shape[-1] != weight.shape[0]:
        return None
    generator = torch.Generator().manual_seed(0)
    powers = torch.exp2(torch.randint(-2, 3, weight.shape, generator=generator).float())
    scale = powers.to(weight.device, weight.dtype)
    before = functional_call(module, {}, (x,))
    if not isinstance(before, torch.Tensor) or before.shape != x.shape or not before.any():
        return None
    biases = {} if bias is None else {"bias": bias * scale}
    expected = before * scale.to(before.dtype)
    if torch.equal(functional_call(module, {"weight": weight * scale, **biases}, (x,)), expected):
        return "weight"
    shifted = functional_call(module, {"weight": (1 + weight) * scale - 1, **biases}, (x,))
    error = (shifted - expected).abs().max()
    # 1 + w is rounded, in the weight's type.
    return "one_plus" if error <= 8 * torch.finfo(weight.dtype).eps * expected.abs().max() else None
