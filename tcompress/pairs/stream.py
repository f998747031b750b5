"""Finds the residual stream of a model: tensors that are sums of one another, who writes into them and who reads them.

While the model runs once, each tensor belongs to a stream. Sums join the streams of their terms; slices along tokens,
views that keep the last axis, copies, casts and products with a single number stay in one. Everything else begins a new
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.weak import WeakTensorKeyDictionary

from tcompress.activations import tensors_in
from tcompress.calibrate import run
from tcompress.pairs.owners import Owners

#: Operations with one tensor after which channels are what they were, if the last axis is as long.
_SAME = frozenset(
    (
        *("view", "_unsafe_view", "reshape", "slice", "select", "index", "index_select", "unsqueeze", "squeeze"),
        *("expand", "clone", "detach", "alias", "_to_copy", "lift_fresh", "copy"),
    )
)
_SUMS = frozenset(("add", "add_"))
_PRODUCTS = frozenset(("mul", "mul_", "div", "div_"))


@dataclass(eq=False)
class Stream:
    """Tensors [..., size] that are sums of one another.

    Attributes:
        size: channels.
        writers: modules whose outputs are terms. readers: modules of which they are inputs.
        obstacles: what else is done with them or makes them, in words.
    """

    size: int
    writers: dict[nn.Module, None] = field(default_factory=dict)
    readers: dict[nn.Module, None] = field(default_factory=dict)
    obstacles: dict[str, None] = field(default_factory=dict)

    def join(self, other: Stream) -> None:
        self.writers |= other.writers
        self.readers |= other.readers
        self.obstacles |= other.obstacles


class StreamTrace(TorchDispatchMode):
    """Runs a model once and finds its streams.

    Args:
        modules: with one tensor in and one out, whose insides are of no interest, by name: linear layers, norms,
            embeddings.
    """

    def __init__(self, modules: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.modules = modules
        #: A few rows [R, C] of each module's input.
        self.inputs: dict[nn.Module, torch.Tensor] = {}
        self._of: Any = WeakTensorKeyDictionary()  # tensor -> stream, which may since have joined another
        self._joined: dict[Stream, Stream] = {}
        self._all: list[Stream] = []
        self._owners = Owners(modules)
        self._inside = 0

    def run(self, model: nn.Module, sample: Any) -> list[Stream]:
        """Calls the model, in evaluation mode. Returns the streams with a writer and a reader, one for each set of
        tensors that sums or a shared weight connect."""
        with ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after).remove)
            with self:
                output = run(model, sample)
        for tensor in tensors_in(output):
            if tensor in self._of:
                self._find(self._of[tensor]).obstacles["it is part of the model's output"] = None
        self._of = WeakTensorKeyDictionary()
        shared: dict[tuple[int, bool], Stream] = {}
        for stream in self._all:
            root = self._find(stream)
            if self._owners.elsewhere & (root.writers.keys() | root.readers.keys()):
                root.obstacles["a weight of a module at it is used outside of that too"] = None
            for module, writes in [(m, True) for m in root.writers] + [(m, False) for m in root.readers]:
                for parameter in module.parameters(recurse=False):
                    self._join(shared.setdefault((id(parameter), writes), root), root)
        roots = {self._find(stream): None for stream in self._all}
        return [root for root in roots if root.writers and root.readers]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if self._inside:
            return output
        self._owners.see(tree_flatten((args, kwargs))[0])
        name = str(func._schema.name).rpartition("::")[2]
        inputs = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, torch.Tensor)]
        results = [t for t in tree_flatten(output)[0] if isinstance(t, torch.Tensor) and t.is_floating_point()]
        floats = [t for t in inputs if t.is_floating_point()]
        if len(results) == 1 and self._kept(name, floats, results[0]):
            streams = [self._stream(t) for t in floats if t.numel() > 1 or t.shape == results[0].shape]
            for other in streams[1:]:
                self._join(streams[0], other)
            self._of[results[0]] = streams[0]
            return output
        for tensor in floats:
            if tensor in self._of:
                self._find(self._of[tensor]).obstacles[f"it goes through {name}"] = None
        for tensor in results:
            self._of[tensor] = self._new(tensor, f"it comes from {name}")
        return output

    def _kept(self, name: str, inputs: list[torch.Tensor], result: torch.Tensor) -> bool:
        """Whether an operation leaves channels as they are."""
        if result.dim() == 0:
            return False
        n = result.shape[-1]
        wide = [t for t in inputs if t.dim() and t.shape[-1] == n]
        if name in _SAME:
            return len(wide) == 1 and wide[0] is inputs[0]
        if name in _SUMS:
            return len(inputs) == 2 and len(wide) == 2
        return name in _PRODUCTS and len(wide) == 1 and all(t is wide[0] or t.numel() == 1 for t in inputs)

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._inside += 1
        self._owners.running.append(module)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dim():
            self._find(self._stream(x)).readers[module] = None
            self.inputs[module] = x.detach().reshape(-1, x.shape[-1])[:8].clone()

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self._inside -= 1
        self._owners.running.pop()
        if isinstance(output, torch.Tensor) and output.dim():
            stream = self._new(output)
            stream.writers[module] = None
            self._of[output] = stream

    def _stream(self, tensor: torch.Tensor) -> Stream:
        if tensor not in self._of:  # a parameter, a buffer, or an input
            self._of[tensor] = self._new(tensor, "a tensor is added that no module gave")
        return self._find(self._of[tensor])

    def _new(self, tensor: torch.Tensor, obstacle: str = "") -> Stream:
        stream = Stream(tensor.shape[-1] if tensor.dim() else 1, obstacles={obstacle: None} if obstacle else {})
        self._all.append(stream)
        return stream

    def _find(self, stream: Stream) -> Stream:
        while stream in self._joined:
            stream = self._joined[stream]
        return stream

    def _join(self, a: Stream, b: Stream) -> None:
        a, b = self._find(a), self._find(b)
        if a is not b:
            a.join(b)
            self._joined[b] = a
