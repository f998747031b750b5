"""The CUDA C++ kernels as a backend of the ops: `csrc/cuda/bindings_cuda.cpp` registers them under torch's CUDA key
when `tcompress._C_cuda` is imported, and this file declares what they take.

They ran on a GPU only where docs/gpu.md says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from tcompress import backend
from tcompress.kernels.triton.reasons import IN_CPU_LAYOUT, MAX_HEAD
from tcompress.ops import int4_cuda_layout
from tcompress.ops.sparse_mma import MMA_TWO_FOUR

LOWEST_CAPABILITY = (8, 0)


def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("tcompress._C_cuda"), None
    except ModuleNotFoundError as error:
        if error.name != "tcompress._C_cuda":
            raise
        return None, "the CUDA extension is not built; install with nvcc and TCOMPRESS_CUDA=1"
    except ImportError as error:  # built, but for another torch or another C library
        return None, f"the CUDA extension does not load: {error}"


EXTENSION, WHY_NOT = _load()


def why_not_here(x: torch.Tensor) -> str | None:
    """The reasons that all CUDA kernels share."""
    if not x.is_cuda:
        return f"the input is on {x.device.type}"
    return WHY_NOT or why_not_this_gpu(x.get_device())


def why_not_this_gpu(index: int) -> str | None:
    """Why the kernels do not run on a GPU of this process, or None. Fake tensors may be on one that is not there."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(index)
    if torch.version.hip or found < LOWEST_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]}: the CUDA kernels want NVIDIA's 8.0"
    return None


# As in triton_backend: torch.compile takes the answer as a constant.
why_not_this_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _linear(x: torch.Tensor, weight: torch.Tensor | None, *args: Any, **kwargs: Any) -> str | None:
    return IN_CPU_LAYOUT if weight is None else None


def _linear_quantized(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    return IN_CPU_LAYOUT if weight is None else None


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    bits: int = 8,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    if bits != 8:
        return f"bits={bits}: the CUDA kernel has 8"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD:
        return f"a head of more than {MAX_HEAD}"
    return None


def _layout(layout: str) -> str | None:
    return None if layout == MMA_TWO_FOUR else f"layout {layout!r}: the CUDA kernel reads {MMA_TWO_FOUR!r}"


def _sparse_linear(
    x: torch.Tensor,
    kernel_weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    layout: str = "1x4",
    *args: Any,
    **kwargs: Any,
) -> str | None:
    return _layout(layout)


def _sparse_unpack(kernel_weight: torch.Tensor, n: int, k: int, dtype: torch.dtype, layout: str) -> str | None:
    return _layout(layout)


def _int4_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    zero_point: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    kernel_weight: torch.Tensor | None = None,
    group_size: int = 128,
    act_bits: int | None = 8,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    if act_bits is not None:
        return f"act_bits={act_bits}: the CUDA kernel leaves activations in floats (W4A16)"
    if x.dtype == torch.float32:
        return "x of float32: the CUDA kernel multiplies 16-bit floats"
    return _not_for_cuda(weight, kernel_weight)


def _int4_multi_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor | None] = (),
    weight_scales: Sequence[torch.Tensor] = (),
    zero_points: Sequence[torch.Tensor | None] = (),
    biases: Sequence[torch.Tensor | None] = (),
    kernel_weights: Sequence[torch.Tensor | None] = (),
    group_size: int = 128,
    act_bits: int | None = 8,
    *args: Any,
    **kwargs: Any,
) -> str | None:
    of_any = _int4_linear(x, weights[0], act_bits=act_bits, kernel_weight=kernel_weights[0])
    reasons = [of_any, *map(_not_for_cuda, weights, kernel_weights)]
    return next((reason for reason in reasons if reason), None)


def _not_for_cuda(weight: torch.Tensor | None, kernel_weight: torch.Tensor | None) -> str | None:
    """Why the CUDA kernel can read neither."""
    in_layout = kernel_weight is not None and kernel_weight.dtype == int4_cuda_layout.DTYPE
    return IN_CPU_LAYOUT if weight is None and not in_layout else None


def _with_shared_reasons(unsupported: Callable[..., str | None]) -> Callable[..., str | None]:
    def checked(x: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
        return why_not_here(x) or unsupported(x, *args, **kwargs)

    return checked


#: What each kernel cannot take, by op.
UNSUPPORTED: dict[str, Callable[..., str | None]] = {
    "quantize_per_token": lambda x, *args, **kwargs: None,
    "int8_linear": _linear,
    "int8_linear_quantized": _linear_quantized,
    "quantized_attention": _attention,
    "int8_sparse_linear": _sparse_linear,
    # packed by the reference, which the dispatcher takes where C++ has registered nothing
    "sparse_prepack": lambda weight, layout: _layout(layout),
    "sparse_unpack": _sparse_unpack,
    "int4_prepack": lambda weight, *args, **kwargs: None,
    "int4_linear": _int4_linear,
    "int4_multi_linear": _int4_multi_linear,
}
for _op, _unsupported in UNSUPPORTED.items():
    backend.register_kernel(_op, "cuda", unsupported=_with_shared_reasons(_unsupported))
