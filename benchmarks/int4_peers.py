"""The linear layers with 4-bit weights in groups that are compared.

All but torchao's get the same integers: symmetric, rounded to nearest. So their errors differ by the activations alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from linear_peer import FLOATS, LinearPeer, quantize_groups, tcompress_linear
from onnx_linear import onnxruntime_int4
from openvino_linear import openvino_int4
from peer import Call, CannotRun
from torchao_linear import torchao_int4, torchao_int8_int4

#: Multiply-adds a call above which torch's float32 kernel, a plain loop, would take most of a second.
FLOAT32_MACS = 1 << 27


def torch_int4(dtype: torch.dtype) -> Callable[..., Call]:
    """`_weight_int4pack_mm_for_cpu` with the activations in `dtype`. Fast in bfloat16 only."""

    def factory(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int) -> Call:
        if dtype != torch.bfloat16 and x.shape[0] * w.numel() > FLOAT32_MACS:
            raise CannotRun(
                f"torch has no vector kernel for it in {dtype}; over {FLOAT32_MACS >> 20} Mi MAC it takes long"
            )
        q, scale = quantize_groups(w, group)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu((q.int() + 8).flatten(1), 1)
        scales = scale[..., 0].t()
        scales_and_zeros = torch.stack([scales, torch.zeros_like(scales)], 2).to(dtype).contiguous()
        x, b = x.to(dtype), b.to(dtype)
        return lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scales_and_zeros).add_(b)

    return factory


def _int4(factory: Callable[..., Call], group: int = 32, scale_bits: int = 32) -> LinearPeer:
    return LinearPeer(factory, 4, 0.2, group, scale_bits)


def _ours(scheme: str, group: int) -> LinearPeer:
    return _int4(tcompress_linear(scheme), group)


#: In the order of the table; the first is the baseline.
PEERS: dict[str, LinearPeer] = {
    **FLOATS,
    "torch-int4-bf16-g32": _int4(torch_int4(torch.bfloat16)),
    "torch-int4-bf16-g128": _int4(torch_int4(torch.bfloat16), 128),
    "torch-int4-fp32-g32": _int4(torch_int4(torch.float32), scale_bits=64),
    "torchao-int4-bf16-g32": _int4(torchao_int4),
    "torchao-int4-int8-g32": _int4(torchao_int8_int4),
    "onnxruntime-int4-fp32-g32": _int4(onnxruntime_int4(1)),
    "onnxruntime-int4-int8-g32": _int4(onnxruntime_int4(4)),
    "onnxruntime-int4-int8-g128": _int4(onnxruntime_int4(4), 128),
    "openvino-int4-g32": _int4(openvino_int4("default")),
    "openvino-int4-dynamic-g32": _int4(openvino_int4("f32")),
    "openvino-int4-dynamic-g128": _int4(openvino_int4("f32"), 128),
    "tcompress-W4A8-g32": _ours("W4A8-g32", 32),
    "tcompress-W4A7-g32": _ours("W4A7-g32", 32),
    "tcompress-W4A16-g32": _ours("W4A16-g32", 32),
    "tcompress-W4A8-g128": _ours("W4A8-g128", 128),
}
