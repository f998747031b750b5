"""The linear layers that are compared: torch's, ONNX Runtime's and ours, one factory each.

A peer runs in a process of its own (`run.py` starts one each): idle worker threads of another library spin and slow
whoever is timed beside them. All peers get the same float32 weight, bias and input.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

Linear = Callable[[], torch.Tensor]
Factory = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Linear]


def _module(w: torch.Tensor, b: torch.Tensor) -> torch.nn.Linear:
    linear = torch.nn.Linear(w.shape[1], w.shape[0])
    linear.weight.data, linear.bias.data = w, b
    return linear.eval()


def torch_fp32(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
    linear = _module(w, b)
    return lambda: linear(x)


def torch_bf16(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
    linear, x = _module(w, b).bfloat16(), x.bfloat16()
    return lambda: linear(x)


def _torch_dynamic(engine: str) -> Factory:
    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated, and the baseline that people have
            model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(_module(w, b)))
        return lambda: model(x)

    return factory


def _tcompress(scheme: str) -> Factory:
    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
        from tcompress.nn import QuantizedLinear

        linear = QuantizedLinear.from_linear(_module(w, b), scheme)
        return lambda: linear(x)

    return factory


def onnxruntime_int8(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Linear:
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper
    from onnxruntime.quantization import QuantType, quantize_dynamic

    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "b"], ["y"]),
    ]
    weights = [numpy_helper.from_array(w.t().contiguous().numpy(), "w"), numpy_helper.from_array(b.numpy(), "b")]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [x.shape[0], w.shape[0]])]
    graph = helper.make_graph(nodes, "linear", inputs, outputs, weights)
    opset = [helper.make_opsetid("", 17)]
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(target.read_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {"x": x.numpy()}
    return lambda: torch.from_numpy(session.run(None, feed)[0])


#: In the order of the table; the first is the baseline.
PEERS: dict[str, Factory] = {
    "torch-fp32": torch_fp32,
    "torch-bf16": torch_bf16,
    "torch-int8-fbgemm": _torch_dynamic("fbgemm"),
    "torch-int8-onednn": _torch_dynamic("onednn"),
    "onnxruntime-int8": onnxruntime_int8,
    "tcompress-W8A8": _tcompress("W8A8"),
    "tcompress-W8A7": _tcompress("W8A7"),
    "tcompress-W7A7": _tcompress("W7A7"),
}
