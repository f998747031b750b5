"""torch's fused Transformer layers, which read weights past any replacement."""

from __future__ import annotations

from torch import nn

from tcompress.nn import (
    CodebookLinear,
    Int8MultiheadAttention,
    LowRankLinear,
    QuantizedLinear,
    SparseLinear,
)


def disable_torch_fast_path(model: nn.Module) -> None:
    """Makes `torch.nn.TransformerEncoder(Layer)` call its linear layers instead of reading their weights.

    In evaluation mode torch hands the float weights of a whole layer to one native function, past any replacement. The
    attributes set here are the ones by which torch itself decides against that.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_compressed(module):
            module.activation_relu_or_gelu = 0
        elif isinstance(module, nn.TransformerEncoder) and _has_compressed(module):
            module.use_nested_tensor = False


def _has_compressed(module: nn.Module) -> bool:
    kinds = QuantizedLinear | SparseLinear | CodebookLinear | LowRankLinear | Int8MultiheadAttention
    return any(isinstance(m, kinds) for m in module.modules())
