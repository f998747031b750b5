"""Fake tensors on a GPU, with a torch that was built without one.

`FakeTensorMode` computes shapes, types, strides and devices, and raises where tensors of two devices meet. Python's
indexing and `.to("cuda")` initialize the device first, which a CPU build refuses: here they become the operators that
they stand for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def _index(x: torch.Tensor, key: Any) -> torch.Tensor:
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in [k for k in keys if not isinstance(k, torch.Tensor)]:
        at = next(i for i, k in enumerate(keys) if k is Ellipsis)
        used = sum(k is not None and k is not Ellipsis for k in keys)
        keys[at : at + 1] = [slice(None)] * (x.dim() - used)
    dim, tensors = 0, []
    for k in keys:
        if k is None:
            x = aten.unsqueeze(x, dim)
        elif isinstance(k, slice):
            x = x if k == slice(None) else aten.slice(x, dim, k.start, k.stop, k.step or 1)
        elif isinstance(k, torch.Tensor):
            tensors += [None] * (dim - len(tensors)) + [k]
        else:
            x = aten.select(x, dim, k)
            continue
        dim += 1
    return aten.index(x, tensors) if tensors else x


_OPERATORS = {
    torch.Tensor.__invert__: aten.bitwise_not,
    torch.Tensor.contiguous: aten.contiguous,
    torch.Tensor.copy_: aten.copy_,
}


class _WithoutInitialization(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return _index(*args)
        if func is torch.Tensor.__setitem__:
            x, key, value = args
            part = _index(x, key)
            return aten.copy_(part, value) if isinstance(value, torch.Tensor) else aten.fill_(part, value)
        if func in _OPERATORS:
            return _OPERATORS[func](*args, **(kwargs or {}))
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.device) and args[1].type == "cuda":
            dtype = args[2] if len(args) > 2 else None
            return aten._to_copy(args[0], device=args[1], dtype=dtype)
        return func(*args, **(kwargs or {}))


@contextmanager
def fake_cuda() -> Iterator[FakeTensorMode]:
    """In the `with` block tensors are fake, and may be made on device "cuda"."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, _WithoutInitialization():
        yield mode


def on_cuda(mode: FakeTensorMode, x: Any) -> Any:
    """The same shape, type and strides on the GPU; lists too."""
    if isinstance(x, list | tuple):
        return type(x)(on_cuda(mode, v) for v in x)
    if not isinstance(x, torch.Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


def outputs(result: Any) -> tuple[Any, ...]:
    """Of an op, as a tuple."""
    return tuple(result) if isinstance(result, tuple | list) else (result,)


def layout(x: torch.Tensor) -> tuple[Any, ...]:
    """Shape, type, and strides of the axes that have another element to step to."""
    strides = [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    return x.shape, x.dtype, strides if x.numel() else None


def graph_of(module: Any, *inputs: Any, **options: Any) -> tuple[list[str], Any]:
    """The operators of a module's one graph, and its result."""
    seen: list[str] = []

    def compiler(graph: Any, _: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    result = torch.compile(module, fullgraph=True, backend=compiler)(*inputs, **options)
    return seen, result
