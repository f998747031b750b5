"""The weight of a linear layer, whatever class it is and whatever computes it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is `transformers`' Conv1D: a linear layer whose weight is stored as [in_features, out_features]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "weight")


def is_masked_by_torch(module: nn.Module) -> bool:
    """Whether `torch.nn.utils.prune` computes the weight before each call, and nothing else is done there."""
    masked = "weight_orig" in module._parameters and "weight_mask" in module._buffers
    return masked and all(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())


def weight_id(module: nn.Module) -> int:
    """Of the parameter that is a layer's weight, or that `torch.nn.utils.prune` computes it from: what is computed is
    another tensor after each call."""
    masked = module._parameters.get("weight_orig")
    return id(module.weight if masked is None else masked)


def weight_key(module: nn.Module) -> tuple[int, bool]:
    """Equal for linear layers with one weight that is used alike: transposed or not, and with one mask."""
    if is_masked_by_torch(module):
        return hash((weight_id(module), id(module.weight_mask))), is_conv1d(module)
    return weight_id(module), is_conv1d(module)


def linear_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear layer or embedding as [N, K]; `transformers`' Conv1D stores it transposed."""
    masked = is_masked_by_torch(module)
    weight: torch.Tensor = module.weight_orig * module.weight_mask if masked else module.weight  # type: ignore[operator,assignment]
    return weight.t() if is_conv1d(module) else weight


def linear_bias(module: nn.Module) -> torch.Tensor | None:
    """The bias of a linear layer; a masked one is computed, since the attribute is that of the last call."""
    masked = "bias_orig" in module._parameters and "bias_mask" in module._buffers
    return module.bias_orig * module.bias_mask if masked else module.bias  # type: ignore[operator,return-value]
