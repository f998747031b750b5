"""Follows the scale of each output channel of a module through a running model, to the linear layers that read it.

Nothing is known of architectures. While the model runs once, every operation on what a source gave is done again on
*twins* of it: random numbers in its place, and the same with each channel multiplied by a power of two of its own::

    source y [..., N]      base twin     b, random, of both signs
                           double        2 b
                           digits        b · 2^e,  e = a digit of the channel's number, one twin a digit

Powers of two make multiplication exact, so an operation commutes with the scales if and only if each element of a digit
twin's result is the base twin's times a power of two, bit for bit, and that of the double exactly twice. Slices, views,
transpositions, the product with probabilities or with a gate, ReLU and repeated heads do; sums over channels, sums with
anything that is not scaled too, softmax, GELU and norms do not, and end the search with a reason. What arrives at a
linear layer tells by its exponents which of the source's channels each of its inputs is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakTensorKeyDictionary

from tcompress.blocks import tensors_in
from tcompress.calibrate import run
from tcompress.pairs.owners import Owners

#: Bits of a channel's number that one twin carries. Float16 has few exponents to spare.
_BITS, _HALF_BITS = 4, 2
#: Operations that add. A summand without a scale would pass where it happens to be zero on this sample.
_SUMS = frozenset(("add", "add_", "sub", "sub_", "rsub", "addcmul", "addcmul_", "addcdiv", "addcdiv_", "lerp", "lerp_"))


@dataclass(eq=False)
class Source:
    """A module whose output channels are followed.

    Attributes:
        module: it.
        readers: of each linear layer that reads its output, for each input [K] the source's channel, -1 where it was
            zero throughout.
        calls: of each reader, how many had their input from here.
        reason: why scales cannot be moved, or "".
    """

    module: nn.Module
    readers: dict[nn.Module, torch.Tensor] = field(default_factory=dict)
    calls: dict[nn.Module, int] = field(default_factory=dict)
    reason: str = ""


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
            for source in self._twins.get(tensor, {}):
                source.reason = source.reason or "its output is part of the model's"
        self._twins = WeakTensorKeyDictionary()
        return output

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        self._owners.see(leaves)
        known = [self._twins.get(leaf, {}) if isinstance(leaf, torch.Tensor) else {} for leaf in leaves]
        results: dict[Source, list[Any]] = {}
        for source in {source: None for twins in known for source in twins}:
            if source.reason:
                continue
            source.reason = _obstacle(func, args, kwargs, leaves, [source in twins for twins in known])
            if source.reason:
                continue
            count = next(len(twins[source]) for twins in known if source in twins)
            done = []
            for i in range(count):
                own = [t[source][i] if source in t else leaf for leaf, t in zip(leaves, known, strict=True)]
                twin_args, twin_kwargs = tree_unflatten(own, spec)
                done.append(func(*twin_args, **twin_kwargs))
            results[source] = done
        output = func(*args, **kwargs)
        for source, done in results.items():
            self._keep(source, func, output, done)
        return output

    def _keep(self, source: Source, func: Any, output: Any, done: list[Any]) -> None:
        """Remembers the twins of an operation's results, or why they are none."""
        flat = [tree_flatten(twin)[0] for twin in done]
        for i, result in enumerate(tree_flatten(output)[0]):
            twins = [twin[i] for twin in flat]
            is_float = isinstance(result, torch.Tensor) and result.is_floating_point()
            if _all_equal(twins) and not (is_float and not twins[0].any()):
                continue  # it does not depend on scales: the log-sum-exp beside an attention's output, a sign
            if not is_float or not _scaled(twins):
                source.reason = f"its output goes through {_name(func)}, which does not commute with scales"
                return
            self._twins.setdefault(result, {})[source] = twins

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
        for source, twins in self._twins.get(x, {}).items() if isinstance(x, torch.Tensor) else ():
            if not source.reason:
                self._arrived(source, module, twins)

    def _after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._owners.running.pop()
        if module in self.linears:
            self._inside -= 1
        source = self.sources.get(module)
        if source is None or source.reason:
            return
        if not isinstance(output, torch.Tensor) or not output.is_floating_point() or output.dim() == 0:
            source.reason = "it does not return one float tensor"
            return
        self._inside += 1
        self._twins[output] = {source: _start(output)}
        self._inside -= 1

    def _arrived(self, source: Source, reader: nn.Module, twins: list[torch.Tensor]) -> None:
        """Reads from the twins at a linear layer's input which channel each of its inputs is."""
        channels = _channels(twins)
        before = source.readers.get(reader)
        if channels is not None and before is not None:
            both = (channels >= 0) & (before >= 0)
            differ = before.shape != channels.shape or bool((channels != before)[both].any())
            channels = None if differ else torch.maximum(channels, before)
        if channels is None:
            source.reason = f"its channels are mixed at {self.linears[reader]}"
            return
        source.readers[reader] = channels
        source.calls[reader] = source.calls.get(reader, 0) + 1


def _start(output: torch.Tensor) -> list[torch.Tensor]:
    """The twins of a source's output [..., N]: base, double, and one a digit of the channel's number."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(output.shape, generator=generator) + 0.5
    sign = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1
    base = (size * sign).to(output.device, output.dtype)
    bits = _bits(output)
    n = output.shape[-1]
    numbers = torch.arange(n, device=output.device)
    digits = max(1, math.ceil(math.log2(max(n, 2)) / bits))
    twins = [base, base * 2]
    for i in range(digits):
        exponents = (numbers >> (i * bits)) % 2**bits - 2 ** (bits - 1)
        twins.append(base * torch.exp2(exponents.float()).to(output.dtype))
    return twins


def _bits(tensor: torch.Tensor) -> int:
    return _HALF_BITS if tensor.dtype == torch.float16 else _BITS


def _all_equal(values: list[Any]) -> bool:
    """Whether an operation's result is the same for all twins."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return all(torch.equal(first, other) for other in values[1:])
    return all(first == other for other in values[1:])


def _scaled(twins: list[torch.Tensor]) -> bool:
    """Whether the double is twice the base, and each digit twin the base times powers of two."""
    base, least = twins[0].float(), _least(twins[0])
    exact = ~(base.abs() < least)  # NaN is compared, and differs
    if not torch.equal((twins[1].float())[exact], base[exact] * 2):
        return False
    mantissa = torch.frexp(base[exact]).mantissa
    for twin in (twin.float() for twin in twins[2:]):
        if not torch.equal(torch.frexp(twin[exact]).mantissa, mantissa) or (twin[~exact].abs() > least**0.5).any():
            return False
    return True


def _least(tensor: torch.Tensor) -> float:
    """Below this a twin may have lost digits: float16 has few exponents."""
    return float(torch.finfo(tensor.dtype).tiny * 2 ** _bits(tensor))


def _channels(twins: list[torch.Tensor]) -> torch.Tensor | None:
    """Which channel of the source each input [K] is, -1 where it is zero throughout; None if that differs by token."""
    base, bits = twins[0], _bits(twins[0])
    rows = base.reshape(-1, base.shape[-1])
    exponent, seen = torch.frexp(rows.float()).exponent, rows.float().abs() >= _least(base)
    first = seen.int().argmax(0, keepdim=True)
    channels = torch.zeros(rows.shape[1], dtype=torch.long, device=rows.device)
    for i, twin in enumerate(twins[2:]):
        digits = torch.frexp(twin.reshape(rows.shape).float()).exponent - exponent + 2 ** (bits - 1)
        digit = digits.gather(0, first)
        if bool(((digits != digit) & seen).any()) or bool(((digit < 0) | (digit >= 2**bits)).any()):
            return None
        channels += digit[0].long() << (i * bits)
    return channels.masked_fill(~seen.any(0), -1)


def _obstacle(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Any], own: list[bool]) -> str:
    """Why an operation cannot be done on twins, or "". `own` tells which leaves have twins."""
    name = _name(func)
    others = [x for x, is_own in zip(leaves, own, strict=True) if isinstance(x, torch.Tensor) and not is_own]
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
