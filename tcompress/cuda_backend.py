"""The CUDA C++ kernels as a backend of the ops: `csrc/cuda/bindings_cuda.cpp` registers them under torch's CUDA key
when `tcompress._C_cuda` is imported, and this file declares what they take.

They ran on a GPU only where docs/gpu.md says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tcompress import backend
from tcompress.kernels.triton.bindings import IN_CPU_LAYOUT, MAX_HEAD

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
}
for _op, _unsupported in UNSUPPORTED.items():
    backend.register_kernel(_op, "cuda", unsupported=_with_shared_reasons(_unsupported))
