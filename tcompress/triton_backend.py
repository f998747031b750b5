"""The Triton kernels as a backend of the ops: `tcompress_triton::<op>` for each op of `kernels.triton.bindings`."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch

from tcompress import backend
from tcompress.kernels.triton.bindings import KERNELS
from tcompress.ops._registry import OPS, Op, differentiates_not

#: The compute capability from which on Triton multiplies 8-bit integers.
LOWEST_CAPABILITY = (8, 0)

#: Why Triton cannot be imported, or None. It is imported when the first kernel runs.
WHY_NO_TRITON = None if importlib.util.find_spec("triton") else "triton is not installed"

_library = torch.library.Library("tcompress_triton", "DEF")


def why_not_this_gpu(index: int) -> str | None:
    """Why the kernels do not run on a GPU of this process, or None. Fake tensors may be on one that is not there."""
    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return "the Triton kernels were never run on AMD's GPUs"
    found = torch.cuda.get_device_capability(index)
    if found < LOWEST_CAPABILITY:
        return f"compute capability {found[0]}.{found[1]}: the Triton kernels want 8.0"
    return None


# What torch.compiler.assume_constant_result sets; calling that would import the compiler, a second, with this package.
why_not_this_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]


def interpreted() -> bool:
    """Whether Triton is forced where it interprets its kernels: how their numbers are tested without a GPU."""
    return backend.forced() == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


def why_not_here(x: torch.Tensor) -> str | None:
    """The reasons that all Triton kernels share."""
    if x.is_cuda:
        return WHY_NO_TRITON or why_not_this_gpu(x.get_device())
    if x.is_cpu and interpreted():
        return WHY_NO_TRITON
    return f"the input is on {x.device.type}"


def _with_shared_reasons(unsupported: Callable[..., str | None]) -> Callable[..., str | None]:
    def checked(x: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
        return why_not_here(x) or unsupported(x, *args, **kwargs)

    return checked


def define(
    op: Op,
    run: Callable[..., Any],
    unsupported: Callable[..., str | None],
    path: Callable[..., str | None] | None = None,
) -> None:
    """Defines `tcompress_triton::<op>` with the schema and the fake of `op`, and declares the backend."""
    _library.define(op.name + op.schema)
    _library.impl(op.name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tcompress_triton::{op.name}", op.fake, lib=_library)
    differentiates_not(op, "tcompress_triton", _library)
    backend.register_kernel(op.name, "triton", unsupported=_with_shared_reasons(unsupported), path=path)


for _name, _kernel in KERNELS.items():
    define(OPS[_name], *_kernel)
