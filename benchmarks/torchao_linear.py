"""torchao's quantized linear layers, compiled as torchao recommends."""

from __future__ import annotations

import re
import warnings
from typing import Any

import torch
from linear_peer import module
from peer import Call, CannotRun


def _quantized(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, config: Any, compiled: bool) -> Call:
    from torchao.quantization import quantize_

    model: torch.nn.Module = torch.nn.Sequential(module(w.to(x.dtype), b.to(x.dtype)))
    quantize_(model, config)
    if compiled:
        model.compile()
    with warnings.catch_warnings(), torch.inference_mode():
        warnings.simplefilter("ignore")  # the compiler's advice to torchao's authors
        model(x)
    return lambda: model(x)


def torchao_int8(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    """int8 weights per channel, int8 activations per token, symmetric; torch.compile fuses the quantization."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return _quantized(x, w, b, Int8DynamicActivationInt8WeightConfig(), compiled=True)


def torchao_int4(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int) -> Call:
    """4-bit weights with zero points, bfloat16 activations. The stable `Int4WeightOnlyConfig` does not take CPU tensors
    (0.18), the prototype does; it calls `_weight_int4pack_mm_for_cpu`, where the compiler has nothing to fuse."""
    try:
        from torchao.prototype.quantization.int4.inference_workflow import PrototypeInt4WeightOnlyConfig
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("torchao."):
            raise CannotRun("this torchao has no 4-bit weights for the CPU") from error
        raise
    return _quantized(x.bfloat16(), w, b, PrototypeInt4WeightOnlyConfig(group_size=group), compiled=False)


def torchao_int8_int4(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, group: int) -> Call:
    """4-bit weights, int8 activations per token, on torchao's own CPU kernel, which its wheels mostly lack."""
    try:
        from torchao.prototype.quantization.int4.inference_workflow import Int8DynamicActivationInt4WeightConfig
    except ModuleNotFoundError as error:
        if error.name and error.name.startswith("torchao."):
            raise CannotRun("this torchao has no 4-bit weights with int8 activations for the CPU") from error
        raise
    if not re.search("^CPU:", torch._C._dispatch_dump("torchao::da8w4_linear_cpu"), flags=re.M):
        raise CannotRun("this build of torchao lacks the CPU kernel da8w4_linear_cpu")
    return _quantized(x, w, b, Int8DynamicActivationInt4WeightConfig(group_size=group), compiled=True)
