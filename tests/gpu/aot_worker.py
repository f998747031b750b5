"""Compiles Triton kernels without a GPU: a process of its own, because once Triton's interpreter is on, as it is for
other tests, a process cannot compile. `aot` starts it and says what to compile, a line of JSON each.

What is compiled is what a launch would compile: the arguments go through Triton's own binder, so that divisibility by
16 and the value 1 are specialized in the same way.
"""

from __future__ import annotations

import base64
import importlib
import json
import sys
import traceback
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature


class Pointer:
    """Stands for a tensor: Triton asks for its type and its alignment."""

    def __init__(self, dtype: torch.dtype, aligned: bool) -> None:
        self.dtype = dtype
        self.address = 256 if aligned else 257

    def data_ptr(self) -> int:
        return self.address


def argument(value: Any) -> Any:
    if isinstance(value, dict):
        return Pointer(getattr(torch, value["pointer"]), value["aligned"])
    return value


def compile_kernel(request: dict[str, Any]) -> dict[str, Any]:
    kernel = getattr(importlib.import_module(request["module"]), request["kernel"])
    if not isinstance(kernel, JITFunction):
        raise TypeError(f"{request['kernel']}: got {type(kernel).__name__}, expected a kernel of triton.jit")
    target = GPUTarget(*request["target"])
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    options = {"debug": False, "instrumentation_mode": ""} | request["kwargs"]
    bound, specialization, options = binder(*map(argument, request["args"]), **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, options)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=target, options=parsed.__dict__)
    metadata = compiled.metadata
    return {
        "asm": {k: v for k, v in compiled.asm.items() if isinstance(v, str)},
        "binary": {k: base64.b64encode(v).decode() for k, v in compiled.asm.items() if isinstance(v, bytes)},
        "name": metadata.name,
        "warps": metadata.num_warps,
        "warp_size": metadata.warp_size,
        "shared": metadata.shared,
        # NVIDIA's alone
        "scratch": getattr(metadata, "global_scratch_size", 0) + getattr(metadata, "profile_scratch_size", 0),
        "arguments": [name for name, kind in signature.items() if kind != "constexpr"],
    }


def main() -> None:
    # what compilers print must not mix with the answers
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        try:
            answer = compile_kernel(json.loads(line))
        except Exception:  # whatever a compiler throws is the answer
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
