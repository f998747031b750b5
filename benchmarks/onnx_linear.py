"""ONNX models of a linear layer, and ONNX Runtime's layers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from linear_peer import pack_nibbles, quantize_groups
from onnx_call import OPSET, call, model
from peer import Call


def float_model(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, opset: int = OPSET) -> Any:
    """A product and a sum, in float32."""
    from onnx import helper

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    return model(nodes, {"x": x}, {"y": b.expand(len(x), -1)}, {"w": w.t(), "b": b}, opset)


def onnxruntime_fp32(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    return call(float_model(x, w, b).SerializeToString(), {"x": x})


def onnxruntime_int8(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    """`quantize_dynamic`, weights per channel: int8 weights, uint8 activations with one scale for the whole input."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(float_model(x, w, b), source)
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
