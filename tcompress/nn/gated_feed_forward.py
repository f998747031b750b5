"""A gated feed-forward network whose first half is one kernel call."""

from __future__ import annotations

import torch
from torch import nn

from tcompress.nn.quantized_linear import QuantizedLinear, multi_linear


class GatedFeedForward(nn.Module):
    """`y = down(activation(gate(x)) · up(x))`, as in Llama (SwiGLU with silu).

    gate and up run in one call that quantizes x once and multiplies the two results where they are made. The layers
    keep the names that they have in the module whose place this takes.

    Paper: Shazeer, "GLU Variants Improve Transformer", arXiv 2002.05202, section 2.

    Args:
        layers: all children of the replaced module by name.
        names: of (down, activation, gate, up).

    Shapes:
        x [..., K] -> [..., N of down].
    """

    def __init__(self, layers: dict[str, nn.Module], names: tuple[str, str, str, str]) -> None:
        super().__init__()
        self._names = names
        for name, layer in layers.items():
            self.add_module(name, layer)

    @classmethod
    def around(cls, module: nn.Module, names: tuple[str, str, str, str]) -> GatedFeedForward | None:
        """Built from the children of `module`; None where they are not two like quantized layers."""
        layers = {name: child for name, child in module._modules.items() if child is not None}
        down, act, gate, up = (layers.get(name) for name in names)
        if not isinstance(gate, QuantizedLinear) or not isinstance(up, QuantizedLinear) or down is None or act is None:
            return None
        alike = (gate.scheme, gate.in_features, gate.out_features) == (up.scheme, up.in_features, up.out_features)
        fused = isinstance(act, nn.Identity) and gate.fused_activation != "none"
        plain = up.fused_activation == up.activation == gate.activation == "none"
        if not (alike and fused and plain) or module._parameters or module._buffers or _has_hooks(module, gate, up):
            return None
        return cls(layers, names).train(module.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        down, _, gate, up = (self._modules[name] for name in self._names)
        assert isinstance(gate, QuantizedLinear)
        assert isinstance(up, QuantizedLinear)
        assert down is not None
        (hidden,) = multi_linear(x, (gate, up), gated=True)
        y: torch.Tensor = down(hidden)
        return y


def _has_hooks(*modules: nn.Module) -> bool:
    return any(m._forward_hooks or m._forward_pre_hooks for m in modules)
