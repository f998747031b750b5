"""Which linear layers pass channels to which, found by running a part of a model and changing what passes.

A consumer is a linear layer, its producers are the ones whose outputs reach nothing but its input. A unit is the
smallest set of channels that keeps to itself on the way: one channel where all that lies between works element by
element (an activation, a gate), a head, or the heads that share keys, where it is attention. Nothing is known of
architectures; that a unit may go is checked again when it goes (`prune.slicing`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from tcompress.activations import tensors_in
from tcompress.calibrate import first_tensor
from tcompress.weights import is_conv1d, linear_weight

#: A change of less than this part of the largest one is none.
_UNCHANGED = 1e-4


@dataclass(frozen=True)
class Producer:
    """A linear layer and the unit of each of its outputs, int64 [N]."""

    layer: nn.Module
    units: torch.Tensor


@dataclass(frozen=True)
class Group:
    """A consumer and its producers.

    Attributes:
        inputs: int64 [K], the unit of each input of the consumer: K/count of each, one after the other.
        count: how many units.
        within: the smallest module that holds all of them.
        numbers: whole numbers of modules in `within` that may have to change with the count: (module, name).
    """

    consumer: nn.Module
    inputs: torch.Tensor
    producers: tuple[Producer, ...]
    count: int
    within: nn.Module
    numbers: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def is_heads(self) -> bool:
        """Whether a unit is more than a channel."""
        return self.count < len(self.inputs)


@dataclass
class Found:
    """Groups of a part of a model, and of the layers that are in none, why not."""

    groups: list[Group] = field(default_factory=list)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


def contiguous_units(channels: int, count: int) -> torch.Tensor:
    """int64 [channels]: 0 0 … 1 1 … of `count` units of one size."""
    return torch.arange(channels) // (channels // count)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer whose weight can be sliced: its own, and used by torch's forward alone."""
    if not (type(module).forward is nn.Linear.forward or is_conv1d(module)):
        return False
    hooked = bool(module._forward_hooks or module._forward_pre_hooks)
    return "weight" in module._parameters and not hooked and not parametrize.is_parametrized(module)


class Probe:
    """Runs a part of a model once, with some outputs changed, and sees what the linear layers get and what comes out.

    Args:
        part: the module.
        run: calls it, on the same inputs each time.
    """

    def __init__(self, part: nn.Module, run: Callable[[], Any]) -> None:
        self.part, self.run = part, run
        self.layers = [m for m in part.modules() if m is not part and is_plain_linear(m)]
        #: In the order of their calls; a layer that is called twice stands here twice.
        self.order: list[nn.Module] = []
        self.outputs: dict[nn.Module, torch.Tensor] = {}
        self.base = self()
        self.calls = self.order
        self.once = [m for m in self.calls if self.calls.count(m) == 1]
        self.given_outputs = dict(self.outputs)

    def __call__(
        self,
        changes: Mapping[nn.Module, torch.Tensor] | None = None,
        frozen: nn.Module | None = None,
    ) -> dict[nn.Module | None, torch.Tensor]:
        """Inputs by layer, and the part's output under None.

        Args:
            changes: bool [N] by layer: to these outputs noise is added.
            frozen: a layer that gives what it gave at first.
        """
        self.order = []
        seen: dict[nn.Module | None, torch.Tensor] = {}
        output: list[torch.Tensor] = []

        def before(layer: nn.Module, args: tuple[Any, ...]) -> None:
            self.order.append(layer)
            seen[layer] = args[0].detach()

        def after(layer: nn.Module, args: Any, out: torch.Tensor) -> torch.Tensor | None:
            self.outputs[layer] = out.detach()
            if layer is frozen:
                return self.given_outputs[layer]
            if changes is not None and layer in changes:
                noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(out)
                size = out.float().std(unbiased=False).clamp(min=1e-3).to(out.dtype)
                return out + noise * size * changes[layer].to(out)
            return None

        def end(part: nn.Module, args: Any, out: Any) -> None:
            output[:] = [t.detach().float() for t in tensors_in(out) if t.is_floating_point()]

        with ExitStack() as stack:
            for layer in self.layers:
                stack.callback(layer.register_forward_pre_hook(before).remove)
                stack.callback(layer.register_forward_hook(after).remove)
            stack.callback(self.part.register_forward_hook(end).remove)
            self.run()
        seen[None] = torch.cat([t.flatten() for t in output]) if output else torch.zeros(0)
        return seen

    def changed(self, got: Mapping[nn.Module | None, torch.Tensor]) -> list[nn.Module | None]:
        """What got something else than at first, in the order of the calls; the output last."""
        return [key for key in (*self.once, None) if key in got and _differs(got[key], self.base[key])]


def _differs(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.shape != b.shape:
        return True
    scale = float(b.float().abs().max()) if b.numel() else 0.0
    return bool(a.numel()) and float((a.float() - b.float()).abs().max()) > 1e-5 * scale


def find_groups(part: nn.Module, run: Callable[[], Any]) -> Found:
    """The groups of a part of a model, which is in evaluation mode without gradients."""
    probe, found = Probe(part, run), Found()
    for layer in probe.layers:
        if layer not in probe.once:
            calls = sum(m is layer for m in probe.calls)
            found.reasons[layer] = "it is not called" if calls == 0 else "it is called more than once"
    reached: dict[nn.Module, list[nn.Module]] = {}
    for i, layer in enumerate(probe.once):
        every = torch.ones(linear_weight(layer).shape[0], dtype=torch.bool)
        later = [m for m in probe.changed(probe({layer: every})) if m is None or probe.once.index(m) > i]
        if not later or later[0] is None:
            continue  # the last one, whose outputs are those of the part
        consumer = later[0]
        past = probe.changed(probe({layer: every}, frozen=consumer))
        if any(m is not consumer for m in past):
            found.reasons[layer] = "what it gives goes past the linear layer that reads it first"
            continue
        reached.setdefault(consumer, []).append(layer)
    for consumer, producers in reached.items():
        units = _units(probe, consumer, producers)
        if units is None:
            for layer in producers:
                found.reasons[layer] = "each of its outputs reaches every input of the next linear layer"
            continue
        count, maps = units
        members = [Producer(layer, m) for layer, m in zip(producers, maps, strict=True)]
        within = _common(part, [consumer, *producers])
        numbers = tuple(_numbers(within, count))
        inputs = contiguous_units(linear_weight(consumer).shape[1], count)
        found.groups.append(Group(consumer, inputs, tuple(members), count, within, numbers))
    return found


def moved(found: Found, part: nn.Module, to: nn.Module) -> Found:
    """What was found in one part of a model, of another with the same modules by name."""
    if part is to:
        return found
    names, there = {m: name for name, m in part.named_modules()}, dict(to.named_modules())
    other = {m: there[name] for m, name in names.items()}
    groups = [
        Group(
            other[g.consumer],
            g.inputs,
            tuple(Producer(other[p.layer], p.units) for p in g.producers),
            g.count,
            other[g.within],
            tuple((other[m], name) for m, name in g.numbers),
        )
        for g in found.groups
    ]
    return Found(groups, {other[m]: reason for m, reason in found.reasons.items()})


def _units(
    probe: Probe, consumer: nn.Module, producers: Sequence[nn.Module]
) -> tuple[int, tuple[torch.Tensor, ...]] | None:
    """The finest units that keep to themselves, and how each producer's outputs are dealt to them."""
    k = linear_weight(consumer).shape[1]
    sizes = [linear_weight(layer).shape[0] for layer in producers]
    for count in range(k, 1, -1):
        if k % count or any(n % count for n in sizes):
            continue
        # One after the other, or as several tensors in one, each dealt like this.
        choices = [[1, n // k] if n % k == 0 and n > k else [1] for n in sizes]
        for chunks in product(*choices):
            if any(n // c % count for n, c in zip(sizes, chunks, strict=True)):
                continue
            maps = tuple(contiguous_units(n // c, count).repeat(c) for n, c in zip(sizes, chunks, strict=True))
            if _keep_to_themselves(probe, consumer, producers, maps, count):
                return count, maps
    return None


def _keep_to_themselves(
    probe: Probe,
    consumer: nn.Module,
    producers: Sequence[nn.Module],
    maps: Sequence[torch.Tensor],
    count: int,
) -> bool:
    half = torch.zeros(count, dtype=torch.bool)
    half[torch.randperm(count, generator=torch.Generator().manual_seed(1))[: (count + 1) // 2]] = True
    inputs = contiguous_units(linear_weight(consumer).shape[1], count)
    for chosen in (half, ~half):
        got = probe({layer: chosen[m] for layer, m in zip(producers, maps, strict=True)})[consumer]
        gap = (got.float() - probe.base[consumer].float()).abs().flatten(0, -2).amax(0)
        other = gap[~chosen[inputs]]
        if not bool(gap.max() > 0) or (other.numel() and bool(other.max() > _UNCHANGED * gap.max())):
            return False
    return True


def _common(part: nn.Module, modules: Sequence[nn.Module]) -> nn.Module:
    """The smallest module in `part` that holds all of these."""
    wanted, best = set(modules), part
    for module in part.modules():
        inside = set(module.modules())
        if wanted <= inside and len(inside) < len(set(best.modules())):
            best = module
    return best


def _numbers(within: nn.Module, count: int) -> Iterator[tuple[nn.Module, str]]:
    """Whole numbers that are as many times the count: a number of heads, or of channels."""
    for module in within.modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            continue
        for name, value in list(vars(module).items()):
            if type(value) is int and value > 0 and value % count == 0:
                yield module, name


def output_of(layer: nn.Module, part: nn.Module, run: Callable[[], Any]) -> tuple[torch.Tensor, list[torch.Size]]:
    """What a linear layer gives in one run of a part of the model, and the shapes of all that the part returns."""
    caught: list[torch.Tensor] = []
    shapes: list[torch.Size] = []

    def after(module: nn.Module, args: Any, out: Any) -> None:
        tensor = first_tensor(out)
        if tensor is not None:
            caught.append(tensor.detach())

    def end(module: nn.Module, args: Any, out: Any) -> None:
        shapes[:] = [t.shape for t in tensors_in(out)]

    with ExitStack() as stack:
        stack.callback(layer.register_forward_hook(after).remove)
        stack.callback(part.register_forward_hook(end).remove)
        run()
    return caught[-1], shapes
