"""Follows the scale of each output channel of a module through a running model, to the linear layers that read it.

Nothing is known of architectures. While the model runs once, every operation on what a source gave is done again on
*twins* of it (`pairs.twins`): random numbers in its place, and the same with each channel multiplied by a power of two
of its own. Powers of two make multiplication exact, so an operation commutes with the scales if and only if each
element of a digit twin's result is the base twin's times a power of two, bit for bit, and that of the double exactly
twice. Slices, views, transpositions, the product with probabilities or with a gate, ReLU and repeated heads do; sums
over channels, sums with anything that is not scaled too, softmax, GELU and norms do not: the channels in that operand
are lost, with a reason. What arrives at a linear layer tells by its exponents which of the source's channels each of
its inputs is.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from tcompress.activations import tensors_in
from tcompress.calibrate import run
from tcompress.pairs.owners import Owners
from tcompress.pairs.twins import all_equal, channels_of, contained, scaled, start

#: Operations that add. A summand without a scale would pass where it happens to be zero on this sample.
_SUMS = frozenset(("add", "add_", "sub", "sub_", "rsub", "addcmul", "addcmul_", "addcdiv", "addcdiv_", "lerp", "lerp_"))
#: Twins of a tensor; of a source whose output was not used yet, none.
Twins = list[torch.Tensor]


@dataclass(eq=False)
class Source:
    """A module whose output channels are followed.

    Attributes:
        module: it.
        readers: of each linear layer that reads its output, for each input [K] the source's channel, -1 where it was
            zero throughout.
        calls: of each reader, how many had their input from here.
        lost: bool [N], channels that also go where no scale can follow; None before the first call.
        reason: why the last of these were lost, or "".
    """

    module: nn.Module
    readers: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    lost: torch.Tensor | None = None
    reason: str = ""

    @property
    def is_over(self) -> bool:
        """Whether no channel is left to follow."""
        return self.lost is not None and bool(self.lost.all())

    def lose(self, reason: str, channels: torch.Tensor | None = None) -> None:
        """Gives up some channels, or all."""
        if not self.is_over:
            self.reason = reason
        size = 1 if self.lost is None else len(self.lost)
        channels = torch.ones(size, dtype=torch.bool) if channels is None else channels
        self.lost = channels if self.lost is None else self.lost | channels

    def finish(self) -> None:
        """Takes channels that were lost on any way out of what readers get."""
        for reader, channels in list(self.readers.items()):
            if self.lost is not None:
                lost = self.lost.to(channels.device)[channels.clamp_min(0)]
                self.readers[reader] = channels.masked_fill(lost, -1)
            if bool((self.readers[reader] < 0).all()):
                del self.readers[reader]


class ScaleTrace(TorchDispatchMode):
    """Runs a model once and follows the outputs of modules.

    Args:
        sources: modules that return one tensor with channels last.
        linears: linear layers, with their names; what one gives depends on all of its inputs, so no scale goes through.
    """

    def __init__(self, sources: Mapping[nn.Module, Source], linears: Mapping[nn.Module, str]) -> None:
        super().__init__()
        self.sources, self.linears = sources, linears
        #: How often each linear layer ran.
        self.calls: dict[nn.Module, int] = {}
        #: Inputs of each source, a few rows [R, C], where it has one and that is as wide as its output.
        self.inputs: dict[nn.Module, torch.Tensor] = {}
        self._twins: Any = WeakTensorKeyDictionary()  # real tensor -> {source: its twins}
        self._owners = Owners([*sources, *linears])
        self._inside = 0

    @property
    def elsewhere(self) -> set[nn.Module]:
        """Modules whose parameters are also used outside of them."""
        return self._owners.elsewhere

    def run(self, model: nn.Module, sample: Any) -> Any:
        """Calls the model, in evaluation mode, and returns its output; results are in `sources`."""
        with ExitStack() as stack:
            for module in {**self.sources, **self.linears}:
                stack.callback(module.register_forward_pre_hook(self._before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(self._after, with_kwargs=True).remove)
            with self:
                output = run(model, sample)
        for tensor in tensors_in(output):
            for source, twins in self._twins.get(tensor, {}).items():
                held = contained(twins, _size(source)) if twins else None
                source.lose("its output is part of the model's", held)
        self._twins = WeakTensorKeyDictionary()
        for source in self.sources.values():
            source.finish()
        return output

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        self._owners.see(leaves)
        known = [self._twins_of(leaf) for leaf in leaves]
        results: dict[Source, list[Twins | None]] = {}
        for source in {source: None for twins in known for source in twins}:
            if source.is_over:
                continue
            own = {i: twins[source] for i, twins in enumerate(known) if source in twins}
            obstacle = _obstacle(func, args, kwargs, [leaf for i, leaf in enumerate(leaves) if i not in own])
            if obstacle:
                for twins in own.values():
                    source.lose(obstacle, contained(twins, _size(source)))
            else:
                results[source] = self._followed(source, func, leaves, spec, own)
        output = func(*args, **kwargs)
        flat = tree_flatten(output)[0]
        for source, found in results.items():
            for tensor, new in zip(flat, found, strict=True) if found else ():
                if new is not None:
                    self._twins.setdefault(tensor, {})[source] = new
        return output

    def _followed(
        self, source: Source, func: Any, leaves: list[Any], spec: Any, own: dict[int, Twins]
    ) -> list[Twins | None]:
        """The twins of an operation's results, None for those without scales; what does not commute is lost.

        Where several operands are of one source, and of different channels, such as queries, keys and values that one
        layer gave, each is tried alone and those that commute are kept.
        """
        results = _redone(func, leaves, spec, own)
        if results is not None:
            return results
        reason = f"its output goes through {_name(func)}, which does not commute with scales"
        held = {i: contained(twins, _size(source)) for i, twins in own.items()}
        disjoint = sum(channels.int() for channels in held.values()).max() <= 1  # type: ignore[union-attr]
        good: dict[int, Twins] = {}
        if len(own) > 1 and disjoint and not func._schema.is_mutable:
            good = {i: twins for i, twins in own.items() if _redone(func, leaves, spec, {i: twins}) is not None}
            results = _redone(func, leaves, spec, good) if good else None
        for i, channels in held.items():
            if results is None or i not in good:
                source.lose(reason, channels)
        return results or []

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._owners.running.append(module)
        x = args[0] if args else next(iter(kwargs.values()), None)
        if module not in self.linears:
            if len(args) + len(kwargs) == 1 and isinstance(x, torch.Tensor) and x.dim() and x.numel():
                self._inside += 1
                self.inputs[module] = x.detach().reshape(-1, x.shape[-1])[:8].clone()
                self._inside -= 1
            return
        self.calls[module] = self.calls.get(module, 0) + 1
        self._inside += 1
        for source, twins in self._twins_of(x).items():
            if not source.is_over:
                self._arrived(source, module, twins)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._owners.running.pop()
        if module in self.linears:
            self._inside -= 1
        source = self.sources.get(module)
        if source is None or source.is_over:
            return
        if not isinstance(output, torch.Tensor) or not output.is_floating_point() or output.dim() == 0:
            source.lose("it does not return one float tensor")
            return
        if source.lost is None:
            source.lost = torch.zeros(output.shape[-1], dtype=torch.bool)
        self._twins[output] = {source: []}  # made when they are needed: logits, which are large, mostly are not

    def _twins_of(self, value: Any) -> dict[Source, Twins]:
        """The twins of a tensor, by source."""
        twins: dict[Source, Twins] = self._twins.get(value, {}) if isinstance(value, torch.Tensor) else {}
        for source, made in twins.items():
            if not made and not source.is_over:
                self._inside += 1
                made += start(value)
                self._inside -= 1
        return twins

    def _arrived(self, source: Source, reader: nn.Module, twins: Twins) -> None:
        """Reads from the twins at a linear layer's input which channel each of its inputs is."""
        channels = channels_of(twins)
        before = source.readers.get(reader)
        if channels is not None and before is not None:
            both = (channels >= 0) & (before >= 0)
            differ = before.shape != channels.shape or bool((channels != before)[both].any())
            channels = None if differ else torch.maximum(channels, before)
        if channels is None:
            source.lose(f"its channels are mixed at {self.linears[reader]}", contained(twins, _size(source)))
            return
        source.readers[reader] = channels
        source.calls[reader] = source.calls.get(reader, 0) + 1


def _size(source: Source) -> int:
    assert source.lost is not None
    return len(source.lost)


def _redone(func: Any, leaves: list[Any], spec: Any, own: dict[int, Twins]) -> list[Twins | None] | None:
    """An operation's results with twins as these operands, result by result; None for those that do not depend on the
    scales, and in all if one does not commute with them."""
    done = []
    for i in range(len(next(iter(own.values())))):
        args, kwargs = tree_unflatten([own[j][i] if j in own else leaf for j, leaf in enumerate(leaves)], spec)
        done.append(tree_flatten(func(*args, **kwargs))[0])
    results: list[Twins | None] = []
    for twins in map(list, zip(*done, strict=True)):
        is_float = isinstance(twins[0], torch.Tensor) and twins[0].is_floating_point()
        if all_equal(twins) and not (is_float and not twins[0].any()):
            results.append(None)  # the log-sum-exp beside an attention's output, a sign
        elif is_float and scaled(twins):
            results.append(twins)
        else:
            return None
    return results


def _obstacle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any]) -> str:
    """Why an operation cannot be done on twins, or "". `leaves` are the operands that have none."""
    name = _name(func)
    others = [x for x in leaves if isinstance(x, torch.Tensor)]
    if name in _SUMS and others:
        return f"its output is added to another tensor ({name})"
    if func._schema.is_mutable:
        names = [a.name for a in func._schema.arguments]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        written = [given.get(a.name) for a in func._schema.arguments if a.alias_info and a.alias_info.is_write]
        if any(x is y for x in tensors_in(written) for y in others):
            return f"its output is written into another tensor ({name})"
    return ""


def _name(func: Any) -> str:
    return str(func._schema.name).rpartition("::")[2]
