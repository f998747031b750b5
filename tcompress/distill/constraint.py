"""What holds for the weights of some layers while they are trained."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tcompress.distill.effective import TensorMap
from tcompress.weights import is_conv1d, linear_weight


class Constraint(nn.Module):
    """Something that acts on the weights of layers at each step of a training. Its buffers and parameters are part of
    the run's checkpoints; its parameters are trained too.

    Args:
        layers: by name; those with one weight may stand for each other.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._layers = dict(layers)  # in a dict, which does not make them children
        #: Steps at which the learning rate of the own parameters is this instead.
        self.lr: float | None = None

    def weight(self, name: str) -> torch.Tensor:
        """[N, K], a view of the parameter."""
        return linear_weight(self._layers[name])

    def gradient(self, name: str) -> torch.Tensor | None:
        """[N, K], a view of the parameter's gradient, or None."""
        module = self._layers[name]
        gradient = module.weight.grad
        assert gradient is None or isinstance(gradient, torch.Tensor)
        return gradient if gradient is None or not is_conv1d(module) else gradient.t()

    def maps(self) -> dict[nn.Module, TensorMap]:
        """How the layers make of their weights [N, K] what they multiply by; none: they multiply by them."""
        return {}

    def before_step(self, step: int) -> None:
        """Before the forward of step 0, 1 …"""

    def penalty(self) -> torch.Tensor | None:
        """What is added to the loss, a scalar, or None."""
        return None

    def after_backward(self) -> None:
        """With the gradients of the step, before they are clipped."""

    def after_step(self, step: int) -> None:
        """After the weights were changed."""

    def extra_repr(self) -> str:
        return f"{len(self._layers)} layers"


class Masks(Constraint):
    """Weights that are zero where a mask is False, at each step exactly: they get no gradient, and whatever the
    optimizer makes of them is set to zero again."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(layers)
        for i, name in enumerate(self._layers):
            self.register_buffer(f"mask_{i}", torch.ones_like(self.weight(name), dtype=torch.bool))

    def mask(self, name: str) -> torch.Tensor:
        """bool [N, K], True where a weight is kept."""
        mask = self._buffers[f"mask_{list(self._layers).index(name)}"]
        assert mask is not None
        return mask

    def set_mask(self, name: str, mask: torch.Tensor) -> None:
        """Keeps what this one, bool [N, K], keeps, and sets the rest to zero."""
        self.mask(name).copy_(mask)
        self.apply_mask(name)

    @torch.no_grad()
    def apply_mask(self, name: str) -> None:
        """Sets to zero what the mask does not keep."""
        self.weight(name).masked_fill_(~self.mask(name), 0)

    @torch.no_grad()
    def after_backward(self) -> None:
        for name in self._layers:
            gradient = self.gradient(name)
            if gradient is not None:
                gradient.masked_fill_(~self.mask(name), 0)

    def after_step(self, step: int) -> None:
        for name in self._layers:
            self.apply_mask(name)


class FixedZeros(Masks):
    """The zeros that weights have stay zero."""

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(layers)
        for name in self._layers:
            self.set_mask(name, self.weight(name) != 0)


def layers_with_zeros(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers whose weights hold zeros, by name. One that is zero as a whole is not meant: adapters start
    that way."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and "weight" in module._parameters:
            zeros = int((linear_weight(module) == 0).sum())
            if 0 < zeros < linear_weight(module).numel():
                found[name] = module
    return found
