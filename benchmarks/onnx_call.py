"""ONNX models of one or a few nodes, and calls of them in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import held
import torch
from peer import Call, CannotRun

OPSET = 17
Tensors = Mapping[str, torch.Tensor]


def _value(name: str, dtype: torch.dtype, shape: Sequence[int]) -> Any:
    from onnx import TensorProto, helper

    types = {torch.float32: TensorProto.FLOAT, torch.int32: TensorProto.INT32, torch.int8: TensorProto.INT8}
    return helper.make_tensor_value_info(name, types[dtype], list(shape))


def model(nodes: list[Any], inputs: Tensors, outputs: Tensors, constants: Tensors, opset: int = OPSET) -> Any:
    """An ONNX model; `inputs` and `outputs` give the names, types and shapes."""
    from onnx import helper, numpy_helper

    weights = [numpy_helper.from_array(value.contiguous().numpy(), name) for name, value in constants.items()]
    given, made = ([_value(name, t.dtype, t.shape) for name, t in side.items()] for side in (inputs, outputs))
    graph = helper.make_graph(nodes, "peer", given, made, weights)
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9 if opset < 21 else 10)


def session(serialized: bytes) -> Any:
    """On torch's number of threads.

    Raises:
        CannotRun: this version does not know the ops of the model, or all is held to an instruction set.
    """
    if held.isa():
        raise CannotRun("ONNX Runtime takes no limit on the instruction set")
    import onnxruntime
    from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(serialized, options, providers=["CPUExecutionProvider"])
    except (Fail, InvalidGraph, NotImplemented) as error:
        raise CannotRun(f"ONNX Runtime {onnxruntime.__version__} does not take the model: {error}") from error


def call(serialized: bytes, inputs: Tensors) -> Call:
    """Gives the first output."""
    running = session(serialized)
    feed = {name: value.numpy() for name, value in inputs.items()}
    return lambda: torch.from_numpy(running.run(None, feed)[0])
