"""Limits of the kernels, and what is said where they do not hold. Does not import Triton."""

import torch

#: Channels of an attention head.
MAX_HEAD = 256
#: Weights of an int4 scale; groups are powers of two from here on.
LEAST_GROUP = 32
IN_CPU_LAYOUT = "the weight is in the layout of the CPU kernels: module.to('cuda') brings it back"
IN_CUDA_LAYOUT = "the weight is in the layout of the CUDA C++ kernel"
#: Tokens from which on a W4A16 layer multiplies by the dequantized weight (int4_dequantize).
DEQUANTIZED_FROM = 256
DEQUANTIZED = (
    f"weight dequantized, then torch's product: the int4 kernel was slower than that from 64 tokens on (H100); "
    f"this way, from {DEQUANTIZED_FROM}, is not measured on a GPU"
)


def multiplies_dequantized(m: int, act_bits: int | None, dtype: torch.dtype, out_dtype: torch.dtype | None) -> bool:
    """Whether an int4 layer of M tokens takes that way: the weight would be rounded for it, so all is in one type."""
    halves = dtype in (torch.float16, torch.bfloat16) and out_dtype in (None, dtype)
    return m >= DEQUANTIZED_FROM and act_bits is None and halves
