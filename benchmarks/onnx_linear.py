"""ONNX Runtime's quantized linear layers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from linear_peer import pack_nibbles, quantize_groups
from onnx_call import call, model
from peer import Call


def onnxruntime_int8(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    """`quantize_dynamic`, weights per channel: int8 weights, uint8 activations with one scale for the whole input."""
    import onnx
    from onnx import helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(model(nodes, {"x": x}, {"y": b.expand(len(x), -1)}, {"w": w.t(), "b": b}), source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        return call(target.read_bytes(), {"x": x})


def onnxruntime_int4(accuracy_level: int) -> Callable[..., Call]:
    """`MatMulNBits` with symmetric weights. Level 4 quantizes the activations to int8, level 1 computes in float32."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int) -> Call:
        from onnx import helper

        n, k = w.shape
        q, scale = quantize_groups(w, group)
        node = helper.make_node(
            "MatMulNBits",
            ["x", "q", "scale", "", "", "b"],
            ["y"],
            domain="com.microsoft",
            K=k,
            N=n,
            bits=4,
            block_size=group,
            accuracy_level=accuracy_level,
        )
        weights = {"q": pack_nibbles(q + 8), "scale": scale.flatten(), "b": b}
        return call(model([node], {"x": x}, {"y": b.expand(len(x), -1)}, weights).SerializeToString(), {"x": x})

    return factory
