"""Drop-in for `torch.nn.Linear` with integer weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tcompress import backend
from tcompress.errors import message
from tcompress.nn.kernel_layout import GPU_BACKENDS, KernelWeight
from tcompress.nn.packed_module import PackedModule
from tcompress.ops.int4_linear import int4_linear
from tcompress.ops.int4_multi_linear import int4_multi_linear
from tcompress.ops.int8_linear import ACTIVATIONS, check_residual
from tcompress.ops.int8_multi_linear import int8_multi_linear
from tcompress.ops.quantize_per_token import FLOAT_DTYPES, check_float
from tcompress.ops.quantize_static import reference as quantize_static
from tcompress.packing import PackedWeight
from tcompress.quantize.observers import InputScale
from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import Scheme
from tcompress.weights import linear_bias, linear_weight


class QuantizedLinear(PackedModule):
    """`y = activation(x Wᵀ + b)` with an int8 weight and activations quantized on the way in, per token
    (`ops.int8_linear`) or by one scale that is fixed (`ops.int8_linear_static`), or with an int4 weight and activations
    quantized or not (`ops.int4_linear`).

    Called like `torch.nn.Linear`; inference only. The state dict holds `weight_packed` (int8 [N, K], or uint8
    [N, ceil(K/2)] with two integers a byte), `weight_scale` ([N], or [N, ceil(K/g)]), `weight_zero_point` if the scheme
    has them, `bias`, and with a static scheme `input_scale` (float32 []) and, where it is asymmetric,
    `input_zero_point` (int32 []). In memory a weight is held once: where a CPU kernel runs, in the layout that it
    reads.

    Args:
        in_features: K. out_features: N.
        bias: whether there is one.
        scheme: W8A8, W8A7, W7A7, W8A8-static, W4A8-g32, W4A16-g128 or another `Scheme`; a weight-only one has 4-bit
            weights. The scale of a static one is 1 until it is set.
        dtype: type of the bias.
        activation: applied to the result inside the kernel: "none", "relu", "gelu", "gelu_tanh", "silu".

    Raises:
        ValueError: a weight-only scheme with more than 4 bits, or an unknown activation.
    """

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
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        if scheme.activations is None and scheme.weights.bits > 4:
            hint = "weight-only linear layers have 4-bit weights, W4A16-g32 for one"
            raise ValueError(message("QuantizedLinear", "scheme", scheme.name, "quantized activations", hint))
        if activation not in ACTIVATIONS:
            raise ValueError(message("QuantizedLinear", "activation", repr(activation), f"one of {ACTIVATIONS}"))
        super().__init__((out_features, in_features), scheme, device)
        self.in_features, self.out_features = in_features, out_features
        self.activation = activation
        #: An activation that `tcompress.fuse` moved here from the module after this one; not part of a checkpoint.
        self.fused_activation = "none"
        self._act_bits = scheme.activations.bits if scheme.activations else None
        self._act_symmetric = scheme.activations.symmetric if scheme.activations else True
        self._int4 = scheme.weights.bits <= 4
        self._static = scheme.static
        if self._static:
            self.register_buffer("input_scale", torch.ones((), dtype=torch.float32, device=device))
            zero = None if self._act_symmetric else torch.zeros((), dtype=torch.int32, device=device)
            self.register_buffer("input_zero_point", zero)
        args = scheme.weights  # in plain values, which torch.compile can compare
        weights = (args.bits > 4, args.group_size, args.symmetric, args.scale_dtype)
        self._kind = (in_features, self._act_bits, self._act_symmetric, self._static, *weights)
        if bias:
            zeros = torch.zeros(out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(zeros, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_packed(
        cls,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype | None = None,
        kernel: KernelWeight | None = None,
        input_scale: InputScale | None = None,
    ) -> QuantizedLinear:
        """A module around an already quantized weight.

        Args:
            kernel: the weight in the kernel layout, if it was derived before; else it is derived here.
            input_scale: of a static scheme, and only of one.

        Raises:
            ValueError: a static scheme without a scale, or the other way round.
        """
        if scheme.static != (input_scale is not None):
            got, expected = ("none", "one") if scheme.static else ("one", "none")
            raise ValueError(message("QuantizedLinear", "input_scale", got, f"{expected}, for {scheme.name}"))
        n, k = packed.shape
        module = cls(k, n, bias is not None, scheme, device="meta", dtype=dtype)
        module._hold(packed, kernel)
        if input_scale is not None:
            device = packed.scale.device
            module.input_scale = torch.tensor(input_scale.scale, dtype=torch.float32, device=device)
            if input_scale.zero_point is not None:
                module.input_zero_point = torch.tensor(input_scale.zero_point, dtype=torch.int32, device=device)
        if bias is not None:
            module.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        return module

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, scheme: str | Scheme = "W8A8", input_scale: InputScale | None = None
    ) -> QuantizedLinear:
        """Quantizes a linear layer by rounding to nearest.

        Args:
            input_scale: of a static scheme, and only of one.

        Raises:
            ValueError: the weight holds NaN or infinity; a static scheme without a scale, or the other way round.
        """
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        packed = round_to_nearest(linear_weight(linear), scheme.weights)
        module = cls.from_packed(packed, linear_bias(linear), scheme, input_scale=input_scale)
        return module.train(linear.training)

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in of zeros with the weight's shape and device and type int8: code that asks a linear layer's weight
        for these gets an answer at no cost, code that would multiply by it fails. The weight itself is
        `packed.dequantize()`."""
        return torch.zeros((), dtype=torch.int8, device=self._device()).expand(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """input: [..., K] float32, bfloat16 or float16. residual: [..., N] in its type, added to the result, or None.
        Returns [..., N] in the input's type."""
        if input.shape[-1:] != (self.in_features,):  # the kernel layout alone, being padded, could not tell
            raise ValueError(message("QuantizedLinear", "input", list(input.shape), f"[..., {self.in_features}]"))
        if not self._int4:
            # The module's own tensors fit together: of the op's checks those of the input are left. Buffers are read
            # from their dict, because nn.Module's attributes cost as much as a small layer.
            if input.dtype not in FLOAT_DTYPES:
                check_float(input, "int8_linear", "x")
            if residual is not None:
                check_residual("int8_linear", residual, input, self.out_features, None)
            held = self._buffers
            if self._static:
                return self._static_forward(input, residual)
            y: torch.Tensor = backend.call(
                "int8_linear",
                input,
                held["qdata"],
                held["scale"],
                self._parameters["bias"],
                held["kernel_weight"],
                self._act_bits,
                self._act_symmetric,
                self._applied_activation,
                None,
                residual,
            )
            return y
        scale, zero_point, group_size = self._int4_parts()
        return int4_linear(
            input,
            self.qdata,
            scale,
            zero_point,
            self.bias,
            self.kernel_weight,
            group_size,
            self._act_bits,
            self._act_symmetric,
            self._applied_activation,
            residual=residual,
        )

    def _static_forward(self, input: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
        held, bits = self._buffers, self._act_bits
        scale, zero_point = held["input_scale"], held["input_zero_point"]
        weights = (held["qdata"], held["scale"], self._parameters["bias"], held["kernel_weight"])
        activation = self._applied_activation
        if input.is_cpu and backend.forced() not in GPU_BACKENDS:
            fixed = (input, scale, zero_point, *weights, bits, self._act_symmetric, activation, None, residual)
            y: torch.Tensor = backend.call("int8_linear_static", *fixed)
            return y
        # The integers in torch, their product in the kernel that takes integers.
        assert bits is not None
        assert scale is not None
        integers = quantize_static(input, scale, zero_point, bits, self._act_symmetric)
        y = backend.call("int8_linear_quantized", *integers, *weights, activation, input.dtype, residual)
        return y

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedLinear:
        before = self._buffers.get("input_scale")
        super()._apply(fn, recurse)
        after = self._buffers.get("input_scale")
        if before is not None and after is not None and after.dtype != before.dtype:
            self.input_scale = before.to(after.device)  # .half() and .bfloat16() must not round it
        return self

    @property
    def _applied_activation(self) -> str:
        return self.activation if self.fused_activation == "none" else self.fused_activation

    def _int4_parts(self) -> tuple[torch.Tensor, torch.Tensor | None, int]:
        """Scales, zero points and group size; of what the kernel layout holds itself, shapes and types alone."""
        args = self.scheme.weights
        group_size = args.group_size or max(self.in_features, 1)
        if self.kernel_weight is None:
            assert self.scale is not None
            return self.scale, self.zero_point, group_size
        groups = (self.out_features, -(-self.in_features // group_size))
        like = self.kernel_weight.new_empty(1, dtype=getattr(torch, args.scale_dtype)).expand(groups)
        zero_point = None if args.symmetric else self.kernel_weight.new_empty(1, dtype=torch.uint8).expand(groups)
        return like, zero_point, group_size

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", scheme={self.scheme.name}"
        activation = self._applied_activation
        return text if activation == "none" else f"{text}, activation={activation}"


def multi_linear(input: torch.Tensor, layers: Sequence[QuantizedLinear], gated: bool = False) -> list[torch.Tensor]:
    """Several layers of one scheme over one input, which is quantized once: `[layer(input) for layer in layers]`.
    Static ones, whose scales may differ, are called one after the other.

    Args:
        input: [..., K].
        layers: with the same scheme, in_features and, unless gated, activation.
        gated: two layers with as many outputs; the one result is `layers[0](input) * layers[1](input)`.

    Raises:
        ValueError: layers that differ in these.
    """
    first = layers[0]
    alike = all(m._kind == first._kind for m in layers)
    expected = "none" if gated else first._applied_activation
    if not alike or any(m._applied_activation != expected for m in layers[1:]):
        raise ValueError(message("multi_linear", "layers", [repr(m) for m in layers], "one scheme and one activation"))
    if input.shape[-1:] != (first.in_features,):
        raise ValueError(message("multi_linear", "input", list(input.shape), f"[..., {first.in_features}]"))
    if first._static:
        outputs: list[torch.Tensor] = [layer(input) for layer in layers]
        return [outputs[0] * outputs[1]] if gated else outputs
    weights, biases, kernels = [m.qdata for m in layers], [m.bias for m in layers], [m.kernel_weight for m in layers]
    symmetric, activation = first._act_symmetric, first._applied_activation
    if not first._int4:
        assert first._act_bits is not None
        scales = [m.weight_scale for m in layers]
        return int8_multi_linear(input, weights, scales, biases, kernels, first._act_bits, symmetric, activation, gated)
    parts = [m._int4_parts() for m in layers]
    scales, zeros, group_size = [p[0] for p in parts], [p[1] for p in parts], parts[0][2]
    bits = first._act_bits
    return int4_multi_linear(
        input, weights, scales, zeros, biases, kernels, group_size, bits, symmetric, activation, gated
    )
