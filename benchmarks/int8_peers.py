"""The int8 linear layers that are compared: integers for weights and activations."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from linear_peer import FLOATS, LinearPeer, module, tcompress_linear
from onnx_linear import onnxruntime_int8
from openvino_linear import openvino_int8
from peer import Call, CannotRun
from torchao_linear import torchao_int8


def _torch_dynamic(engine: str) -> Callable[..., Call]:
    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
        if engine not in torch.backends.quantized.supported_engines:
            raise CannotRun(f"this torch has no quantized engine {engine}")
        torch.backends.quantized.engine = engine
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.ao is deprecated, and the baseline that people have
            model = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(module(w, b)))
        return lambda: model(x)

    return factory


#: In the order of the table; the first is the baseline.
PEERS: dict[str, LinearPeer] = {
    **FLOATS,
    "torch-int8-fbgemm": LinearPeer(_torch_dynamic("fbgemm"), 8),
    "torch-int8-onednn": LinearPeer(_torch_dynamic("onednn"), 8),
    "torchao-int8": LinearPeer(torchao_int8, 8),
    "onnxruntime-int8": LinearPeer(onnxruntime_int8, 8),
    "openvino-int8": LinearPeer(openvino_int8("default"), 8),
    "openvino-int8-dynamic": LinearPeer(openvino_int8("f32"), 8),
    "tcompress-W8A8": LinearPeer(tcompress_linear("W8A8"), 8),
    "tcompress-W8A7": LinearPeer(tcompress_linear("W8A7"), 8),
    "tcompress-W7A7": LinearPeer(tcompress_linear("W7A7"), 8),
}
