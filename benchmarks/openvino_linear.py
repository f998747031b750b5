"""OpenVINO's linear layers with compressed weights.

The weight is an integer constant with its scales, which the CPU plugin keeps compressed. With `precision="f32"` the
plugin also quantizes the activations dynamically, in groups of K, and multiplies integers. Left to itself ("default")
it computes in bfloat16 on processors that can, and then leaves the activations alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from linear_peer import pack_nibbles, quantize_groups
from openvino_call import call, compiled
from peer import Call

#: Activations that share a scale where the weights have one a channel: it divides the K of all shapes.
INT8_GROUP = 128


def _compiled(weight: Any, x: torch.Tensor, b: torch.Tensor, precision: str, group: int) -> Call:
    """`x weightᵀ + b` for an OpenVINO node `weight` [N, K]."""
    import openvino
    from openvino import opset13 as ops

    parameter = ops.parameter(list(x.shape), openvino.Type.f32, "x")
    y = ops.add(ops.matmul(parameter, weight, False, True), ops.constant(b[None].numpy()))
    options = {} if precision == "default" else {"DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    return call(compiled(openvino.Model([y], [parameter], "linear"), precision, **options), [x])


def openvino_int8(precision: str) -> Callable[..., Call]:
    """int8 weights, symmetric, one scale a channel."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
        from openvino import opset13 as ops

        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-10) / 127
        integers = ops.constant((w / scale).round().to(torch.int8).numpy())
        weight = ops.multiply(ops.convert(integers, "f32"), ops.constant(scale.numpy()))
        return _compiled(weight, x, b, precision, INT8_GROUP)

    return factory


def openvino_int4(precision: str) -> Callable[..., Call]:
    """i4 weights, symmetric, one scale a group; dynamic quantization takes groups of the same size."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int) -> Call:
        import openvino
        from openvino import opset13 as ops

        q, scale = quantize_groups(w, group)
        packed = pack_nibbles(q.view(torch.uint8) & 15).numpy()
        integers = ops.constant(openvino.Tensor(packed, list(q.shape), openvino.Type.i4))
        weight = ops.multiply(ops.convert(integers, "f32"), ops.constant(scale.numpy()))
        weight = ops.reshape(weight, ops.constant(list(w.shape)), False)
        return _compiled(weight, x, b, precision, group)

    return factory
