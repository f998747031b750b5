"""Beside our kernels in `gpu_ops.py`: torch's int8 product and 2:4 weights, and attention of installed packages."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[[], Any]
#: torch._int_mm takes more rows than this.
INT_MM_ROWS = 16


def int_mm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """A W8A8 layer in plain torch around torch._int_mm, the quantization of x included; rows are filled up to 17."""
    size = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 127
    q = (x / size).round().clamp(-127, 127).to(torch.int8)
    missing = max(INT_MM_ROWS + 1 - len(q), 0)
    sums = torch._int_mm(F.pad(q, (0, 0, 0, missing)) if missing else q, weight.t())[: len(q)]
    return (sums.float() * size * scale + bias).to(x.dtype)


def two_four(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> Call:
    """torch's own 2:4 layer; its products want rows in eights, which are filled up outside of the time."""
    compressed = torch.sparse.to_sparse_semi_structured(weight)
    missing = -len(x) % 8
    filled = F.pad(x, (0, 0, 0, missing)) if missing else x
    return lambda: F.linear(filled, compressed, bias)[: len(x)]


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Call]:
    """[B, H, S, D], of the packages that are installed."""
    found: dict[str, Call] = {}
    if (sage := _installed("sageattention")) is not None:
        found["sageattention"] = partial(sage.sageattn, q, k, v, tensor_layout="HND", is_causal=causal)
    if (flash := _installed("flash_attn")) is not None:
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        found["flash_attn"] = lambda: flash.flash_attn_func(*turned, causal=causal).transpose(1, 2)
    return found


def varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, offsets: torch.Tensor, longest: int) -> dict[str, Call]:
    """[T, H, D], causal, of the packages that are installed."""
    flash = _installed("flash_attn")
    if flash is None:
        return {}
    ends = offsets.int()
    call = partial(flash.flash_attn_varlen_func, q, k, v, ends, ends, longest, longest, causal=True)
    return {"flash_attn": call}


def _installed(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:  # installed, and something of its own is missing
            raise
        return None
