"""ONNX Runtime's quantized linear layers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peer import Linear, pack_nibbles, quantize_groups


def _model(nodes: list[Any], x: torch.Tensor, n: int, weights: dict[str, torch.Tensor]) -> Any:
    """An ONNX model from x to y [M, N]."""
    from onnx import TensorProto, helper, numpy_helper

    constants = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in weights.items()]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], n])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)


def _session(model: bytes, x: torch.Tensor) -> Linear:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


def onnxruntime_int8(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
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
        onnx.save(_model(nodes, x, w.shape[0], {"w": w.t(), "b": b}), source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        return _session(target.read_bytes(), x)


def onnxruntime_int4(accuracy_level: int) -> Callable[..., Linear]:
    """`MatMulNBits` with symmetric weights. Level 4 quantizes the activations to int8, level 1 computes in float32."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int) -> Linear:
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
        return _session(_model([node], x, n, weights).SerializeToString(), x)

    return factory
