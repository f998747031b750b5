"""The attentions that are compared: over several tokens, and of one new token over a cache."""

from __future__ import annotations

import torch
from attention_peer import AttentionPeer, tcompress_attention, tcompress_cache, torch_math, torch_sdpa
from onnx_attention import (
    onnxruntime_attention,
    onnxruntime_cache,
    onnxruntime_grouped,
    onnxruntime_int8_cache,
    onnxruntime_multi_head,
)
from openvino_attention import openvino_attention, openvino_cache, openvino_int8
from torchao_attention import torchao_int8

#: Of one static scale a tensor, the probabilities too: 0.03 at 128 normal tokens, 0.3 at 2048.
STATIC = 0.5

#: In the order of the table; the first is the baseline.
ATTENTION: dict[str, AttentionPeer] = {
    "torch-fp32": AttentionPeer(torch_sdpa(torch.float32), 32),
    "torch-bf16": AttentionPeer(torch_sdpa(torch.bfloat16), 16),
    "torch-math": AttentionPeer(torch_math, 32),
    "torchao-int8": AttentionPeer(torchao_int8, 8, STATIC),
    "onnxruntime-MHA": AttentionPeer(onnxruntime_multi_head, 32),
    "onnxruntime-Attention": AttentionPeer(onnxruntime_attention, 32),
    "onnxruntime-GQA": AttentionPeer(onnxruntime_grouped, 32),
    "openvino-fp32": AttentionPeer(openvino_attention("f32"), 32),
    "openvino-bf16": AttentionPeer(openvino_attention("bf16"), 16),
    "openvino-int8": AttentionPeer(openvino_int8, 8, STATIC),
    "tcompress-auto": AttentionPeer(tcompress_attention("auto"), 32, 0.03),
    "tcompress-8": AttentionPeer(tcompress_attention(8), 32, 0.03),
    "tcompress-12": AttentionPeer(tcompress_attention(12), 32, 0.005),
}

#: One token: what is read is K and V in the type of the cache.
DECODE: dict[str, AttentionPeer] = {
    "torch-fp32": AttentionPeer(torch_sdpa(torch.float32), 32),
    "torch-bf16": AttentionPeer(torch_sdpa(torch.bfloat16), 16),
    "onnxruntime-fp32": AttentionPeer(onnxruntime_attention, 32),
    "onnxruntime-fp32-cache": AttentionPeer(onnxruntime_cache, 32),
    "onnxruntime-int8-cache": AttentionPeer(onnxruntime_int8_cache, 8, 0.05),
    "openvino-fp32-cache": AttentionPeer(openvino_cache("f32", "f32"), 32),
    "openvino-bf16-cache": AttentionPeer(openvino_cache("bf16", "bf16"), 16),
    "openvino-int8-cache": AttentionPeer(openvino_cache("f32", "u8"), 8, 0.03, 64),
    "tcompress-fp32": AttentionPeer(tcompress_attention("auto"), 32, 0.03),
    "tcompress-int8-cache": AttentionPeer(tcompress_cache, 8, 0.03, 32),
}
