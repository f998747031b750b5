"""The Transformer's position-wise two-layer network."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def activation_name(activation: str | Callable[[Tensor], Tensor]) -> str:
    """Name in `ACTIVATIONS` of an activation given by name, as a torch function, or as a torch module.

    Raises:
        ValueError: it is none of them. A lambda or a partial cannot be recognised, whatever it computes.
    """
    if isinstance(activation, str) and activation in ACTIVATIONS:
        return activation
    if activation in (F.relu, torch.relu) or type(activation) is nn.ReLU:
        return "relu"
    if activation is F.gelu:
        return "gelu"
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    if activation is F.silu or type(activation) is nn.SiLU:
        return "silu"
    raise ValueError(
        f"FeedForward: activation: got {activation!r}, expected one of {', '.join(ACTIVATIONS)} or the "
        "torch function or module of that name; for gelu_tanh the module is torch.nn.GELU(approximate='tanh')"
    )


class FeedForward(nn.Module):
    """Apply the same two-layer network to every token.

    ``y = activation(x W1^T + b1) W2^T + b2``

    Paper: Vaswani et al., "Attention Is All You Need", arXiv 1706.03762, section 3.3 (ReLU).
    GELU, its tanh approximation, and SiLU ``x * sigmoid(x)``: Hendrycks, Gimpel, arXiv 1606.08415, section 2.

    Args:
        d_model: size of the last axis of input and output.
        d_ff: size of the hidden layer.
        activation: ``"relu"``, ``"gelu"`` (exact, by erf), ``"gelu_tanh"`` or ``"silu"``.
        bias: ``False`` leaves out ``b1`` and ``b2``.

    Shapes:
        x ``[..., d_model]`` floating -> same shape and dtype.
        ``linear1.weight`` ``[d_ff, d_model]``, ``linear2.weight`` ``[d_model, d_ff]``.

    Raises:
        ValueError: a size below 1, an unknown activation, or a last axis other than ``d_model``.
    """

    def __init__(
        self,
        d_model: int,
        d_ff: int,
        activation: str = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("d_ff", d_ff)):
            if value < 1:
                raise ValueError(f"FeedForward: {name}: got {value}, expected at least 1; it is a size")
        self.d_model = d_model
        self.d_ff = d_ff
        self.activation = activation_name(activation)
        self.linear1 = nn.Linear(d_model, d_ff, bias=bias, device=device, dtype=dtype)
        self.linear2 = nn.Linear(d_ff, d_model, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 0 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"FeedForward: x: got shape {tuple(x.shape)}, expected [..., {self.d_model}]; the last axis is d_model"
            )
        hidden = self.linear1(x)
        if getattr(self.linear1, "fused_activation", "none") == "none":
            hidden = ACTIVATIONS[self.activation](hidden)
        y: Tensor = self.linear2(hidden)
        return y

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
