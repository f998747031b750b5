"""OpenVINO's linear layers with compressed weights.

The weight is an integer constant with its scales, which the CPU plugin keeps compressed. With `precision="f32"` the
plugin also quantizes the activations dynamically, in groups of K, and multiplies integers. Left to itself ("default")
it computes in bfloat16 on processors that can, and then leaves the activations alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peer import Linear, pack_nibbles, quantize_groups

#: Activations that share a scale where the weights have one a channel: it divides the K of all shapes.
INT8_GROUP = 128


def _compiled(weight: Any, x: torch.Tensor, b: torch.Tensor, precision: str, group: int) -> Linear:
    """`x weightᵀ + b` for an OpenVINO node `weight` [N, K]."""
    import openvino
    from openvino import opset13 as ops

    parameter = ops.parameter(list(x.shape), openvino.Type.f32, "x")
    y = ops.add(ops.matmul(parameter, weight, False, True), ops.constant(b[None].numpy()))
    config: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if precision != "default":
        config |= {"INFERENCE_PRECISION_HINT": precision, "DYNAMIC_QUANTIZATION_GROUP_SIZE": group}
    model = openvino.Core().compile_model(openvino.Model([y], [parameter], "linear"), "CPU", config)
    request, feed = model.create_infer_request(), [x.numpy()]
    return lambda: torch.from_numpy(request.infer(feed, share_inputs=True, share_outputs=True)[0])


def openvino_int8(precision: str) -> Callable[..., Linear]:
    """int8 weights, symmetric, one scale a channel."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
        from openvino import opset13 as ops

        scale = w.abs().amax(1, keepdim=True).clamp(min=1e-10) / 127
        integers = ops.constant((w / scale).round().to(torch.int8).numpy())
        weight = ops.multiply(ops.convert(integers, "f32"), ops.constant(scale.numpy()))
        return _compiled(weight, x, b, precision, INT8_GROUP)

    return factory


def openvino_int4(precision: str) -> Callable[..., Linear]:
    """i4 weights, symmetric, one scale a group; dynamic quantization takes groups of the same size."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int) -> Linear:
        import openvino
        from openvino import opset13 as ops

        q, scale = quantize_groups(w, group)
        packed = pack_nibbles(q.view(torch.uint8) & 15).numpy()
        integers = ops.constant(openvino.Tensor(packed, list(q.shape), openvino.Type.i4))
        weight = ops.multiply(ops.convert(integers, "f32"), ops.constant(scale.numpy()))
        weight = ops.reshape(weight, ops.constant(list(w.shape)), False)
        return _compiled(weight, x, b, precision, group)

    return factory
