"""Drop-in for `torch.nn.Linear` with integer weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tcompress.errors import message
from tcompress.ops import int8_linear, int8_prepack
from tcompress.ops.int8_linear import ACTIVATIONS
from tcompress.packing import PackedWeight
from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import Scheme


class QuantizedLinear(nn.Module):
    """`y = x Wᵀ + b` with an int8 weight and activations quantized per token on the way in (`ops.int8_linear`).

    Called like `torch.nn.Linear`; inference only. The state dict holds `weight_packed` (int8 [N, K]), `weight_scale`
    (float32 [N]) and `bias`. The kernel layout is kept beside them, never saved, and derived again after `.to(device)`
    and after loading.

    Args:
        in_features: K. out_features: N.
        bias: whether there is one.
        scheme: W8A8, W8A7, W7A7 or another `Scheme` with quantized activations.
        dtype: type of the bias.
        activation: applied to the result inside the kernel: "none", "relu", "gelu", "gelu_tanh", "silu".

    Raises:
        ValueError: a weight-only scheme, or an unknown activation.
    """

    weight_packed: torch.Tensor
    weight_scale: torch.Tensor
    kernel_weight: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        scheme: str | Scheme = "W8A8",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        activation: str = "none",
    ) -> None:
        super().__init__()
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        if scheme.activations is None:
            hint = "weight-only linear layers are not implemented yet"
            raise ValueError(message("QuantizedLinear", "scheme", scheme.name, "quantized activations", hint))
        if activation not in ACTIVATIONS:
            raise ValueError(message("QuantizedLinear", "activation", repr(activation), f"one of {ACTIVATIONS}"))
        self.in_features, self.out_features = in_features, out_features
        self.scheme, self.activation = scheme, activation
        self._act_bits, self._act_symmetric = scheme.activations.bits, scheme.activations.symmetric
        shape = (out_features, in_features)
        self.register_buffer("weight_packed", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(out_features, dtype=torch.float32, device=device))
        if bias:
            zeros = torch.zeros(out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        else:
            self.register_parameter("bias", None)
        self.register_buffer("kernel_weight", None, persistent=False)
        self._derive_kernel_weight()

    @classmethod
    def from_packed(
        cls, packed: PackedWeight, bias: torch.Tensor | None, scheme: Scheme, dtype: torch.dtype | None = None
    ) -> QuantizedLinear:
        """A module around an already quantized weight, which it shares."""
        n, k = packed.shape
        module = cls(k, n, bias is not None, scheme, device="meta", dtype=dtype)
        module.weight_packed, module.weight_scale = packed.qdata, packed.scale
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        module._derive_kernel_weight()
        return module

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: str | Scheme = "W8A8") -> QuantizedLinear:
        """Quantizes a linear layer by rounding to nearest.

        Raises:
            ValueError: the weight holds NaN or infinity.
        """
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        packed = round_to_nearest(linear.weight, scheme.weights)
        module = cls.from_packed(packed, linear.bias, scheme)
        return module.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """The stored integers, [N, K] int8: code that asks a linear layer's weight for its device or type gets an
        answer, code that would compute with it fails instead of computing with integers. The weight itself is
        `packed.dequantize()`."""
        return self.weight_packed

    @property
    def packed(self) -> PackedWeight:
        """The weight in its storage layout; shares memory with the module."""
        return PackedWeight(self.weight_packed, self.weight_scale, (self.out_features, self.in_features))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input: [..., K] float32, bfloat16 or float16. Returns [..., N] in its type."""
        return int8_linear(
            input,
            self.weight_packed,
            self.weight_scale,
            self.bias,
            self.kernel_weight,
            self._act_bits,
            self._act_symmetric,
            self.activation,
        )

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", scheme={self.scheme.name}"
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _derive_kernel_weight(self) -> None:
        on_cpu = self.weight_packed.device.type == "cpu"
        self.kernel_weight = int8_prepack(self.weight_packed) if on_cpu else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        # .half() and .bfloat16() must not round the scales, and the kernel layout belongs to one device.
        scale, self.kernel_weight = self.weight_scale, None
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale = scale.to(self.weight_scale.device)
        self._derive_kernel_weight()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._derive_kernel_weight()
