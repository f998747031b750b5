"""Collects what algorithms decide by: statistics of layers' inputs. The one place where this is done."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from tcompress.padding import counted
from tcompress.statistics import InputStatistics
from tcompress.weights import linear_weight, weight_key

#: Layers with one weight have the same (`weights.weight_key`).
Key = tuple[int, bool]
#: Of each sample a call of the original model and one of the compressed one.
Pairs = Sequence[tuple[Callable[[], None], Callable[[], None]]]


def layers_by_input(layers: Sequence[nn.Module], run: Callable[[], None]) -> list[list[nn.Module]]:
    """Layers in the order of their first calls, those together that are given the very same tensors, call by call: Q, K
    and V, or gate and up. Layers with one weight stand together too; those that are never called come last.

    Args:
        run: calls what holds the layers, on one sample.
    """
    given: dict[Key, list[torch.Tensor]] = {}
    with ExitStack() as stack:
        for layer, key in [(layer, weight_key(layer)) for layer in layers]:

            def note(module: Any, args: Any, kwargs: Any, key: Key = key) -> None:
                given.setdefault(key, []).append(_input(args, kwargs))

            stack.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        run()
    order = list(given)
    groups: list[tuple[list[torch.Tensor], list[nn.Module]]] = []
    for layer in sorted(layers, key=lambda m: order.index(weight_key(m)) if weight_key(m) in given else len(order)):
        own = given.get(weight_key(layer), [])
        if groups and _same(groups[-1][0], own):
            groups[-1][1].append(layer)
        else:
            groups.append((own, [layer]))
    return [group for _, group in groups]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Not of layers that were not called: nothing is known of what they are given."""
    return bool(one) and len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def collect(
    groups: Collection[Collection[nn.Module]],
    run: Callable[[], None],
    hessian: bool | Collection[Key],
    pairs: Pairs | None = None,
    limit: int | None = None,
    rows: int = 0,
) -> Iterator[dict[Key, InputStatistics]]:
    """The statistics of layers' inputs, of as many layers at a time as fit; all at once where there is no limit.

    Layers with one weight share theirs. So do layers that are given the very same tensors, call by call; one that is
    not from some call on gets its own in another run, and comes later.

    Args:
        groups: those of a group come together; of `layers_by_input`, or one for each layer.
        run: calls what holds the layers, on all samples.
        hessian: of all layers, or by weight of which.
        pairs: instead of `run`, for layers that make up for the difference of their inputs.
        limit: bytes of the Hessians at a time; one group comes even if it alone has more.
        rows: keep so many of each call's inputs as they are (`RowStatistics`).
    """
    waiting = _by_weight(groups)
    while waiting:
        part: list[list[nn.Module]] = []
        room = limit
        while waiting and (not part or room is None or _nbytes(waiting[0], hessian, pairs) <= room):
            room = None if room is None else room - _nbytes(waiting[0], hessian, pairs)
            part.append(waiting.pop(0))
        layers = [layer for group in part for layer in group]
        collector = InputCollector(layers, hessian, rows)
        collector.run(run, pairs)
        waiting += [[layer for layer in layers if weight_key(layer) == key] for key in collector.apart]
        yield collector.statistics
        del collector


def collect_all(*args: Any, **kwargs: Any) -> dict[Key, InputStatistics]:
    """As `collect`, of all layers together."""
    return {key: found for part in collect(*args, **kwargs) for key, found in part.items()}


def _by_weight(groups: Collection[Collection[nn.Module]]) -> list[list[nn.Module]]:
    """Groups in which all layers with one weight stand in the first that has it."""
    found: list[list[nn.Module]] = []
    place: dict[Key, list[nn.Module]] = {}
    for group in groups:
        own: list[nn.Module] = []
        for layer in group:
            place.setdefault(weight_key(layer), own).append(layer)
        if own:
            found.append(own)
    return found


def _nbytes(group: Collection[nn.Module], hessian: bool | Collection[Key], pairs: Pairs | None) -> int:
    """Of the Hessians of a group, each but once for all layers with one input, as they are said to be."""
    widths = {linear_weight(layer).shape[1] for layer in group if _wanted(weight_key(layer), hessian)}
    return sum(4 * k * k for k in widths) * (1 if pairs is None else 2)


def _wanted(key: Key, hessian: bool | Collection[Key]) -> bool:
    return hessian if isinstance(hessian, bool) else key in hessian


class RowStatistics(InputStatistics):
    """With some of the inputs as they are.

    Attributes:
        rows: float32 [M, K], finite.
    """

    def __init__(self, in_features: int, hessian: bool, device: torch.device | str | None, rows: int) -> None:
        super().__init__(in_features, hessian, device)
        self._rows, self._kept = rows, [torch.empty(0, in_features, device=device)]

    def add(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        super().add(x, *args, **kwargs)
        flat = counted(x.detach()).reshape(-1, x.shape[-1])
        stride = max(len(flat) // self._rows, 1)
        self._kept.append(flat[::stride][: self._rows].float().clone())

    @property
    def rows(self) -> torch.Tensor:
        kept = torch.cat(self._kept)
        return kept[torch.isfinite(kept).all(1)]


class _Seen:
    """What one weight's layers were given so far."""

    def __init__(self) -> None:
        self.calls = 0
        self.last: Callable[[], torch.Tensor | None] = lambda: None
        self.statistics: InputStatistics | None = None
        self.lead: _Seen | None = None
        self.expected: list[torch.Tensor] = []


class InputCollector:
    """Hooks on layers that add up their inputs while a model runs.

    Attributes:
        statistics: by weight; of a layer that was never called, those of no input.
        apart: weights that were given what another was, until they were not: they are not in `statistics`.
    """

    def __init__(self, layers: Collection[nn.Module], hessian: bool | Collection[Key], rows: int = 0) -> None:
        self._layers, self._hessian, self._rows = layers, hessian, rows
        self._seen = {weight_key(layer): _Seen() for layer in layers}
        self._mode = "add"
        self.statistics: dict[Key, InputStatistics] = {}
        self.apart: list[Key] = []

    def run(self, run: Callable[[], None], pairs: Pairs | None = None) -> None:
        """Calls what calls the layers, and collects."""
        with ExitStack() as stack:
            # Keys are those of before: a hook on a layer that torch masks changes its key.
            for layer, key in [(layer, weight_key(layer)) for layer in self._layers]:
                stack.callback(layer.register_forward_pre_hook(partial(self._hook, key), with_kwargs=True).remove)
            if pairs is None:
                run()
            for original, compressed in pairs or ():
                for seen in self._seen.values():
                    seen.expected = []
                self._mode = "expect"
                original()
                self._mode = "compare"
                compressed()
        for layer in self._layers:
            key = weight_key(layer)
            seen = self._seen[key]
            lead = seen.lead or seen
            if lead.calls != seen.calls and key not in self.apart:
                self.apart.append(key)
            if key not in self.apart:
                self.statistics[key] = lead.statistics or self._new(layer, key)

    def groups(self) -> list[list[nn.Module]]:
        """The layers by the statistics that they share."""
        found: dict[int, list[nn.Module]] = {}
        for layer in self._layers:
            key = weight_key(layer)
            found.setdefault(id(self.statistics.get(key, key)), []).append(layer)
        return list(found.values())

    def rows_of(self, layer: nn.Module) -> int:
        """How many inputs a layer was given."""
        found = self.statistics.get(weight_key(layer))
        return 0 if found is None else found.count + found.left_out

    def _new(self, layer: nn.Module, key: Key) -> InputStatistics:
        weight, wanted = linear_weight(layer), _wanted(key, self._hessian)
        if self._rows:
            return RowStatistics(weight.shape[1], wanted, weight.device, self._rows)
        return InputStatistics(weight.shape[1], wanted, weight.device)

    def _hook(self, key: Key, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, seen = _input(args, kwargs), self._seen[key]
        seen.calls += 1
        if seen.calls == 1:
            seen.lead = self._lead(key, x)
        if seen.lead is not None:
            if (seen.lead.last() is not x or seen.lead.calls != seen.calls) and key not in self.apart:
                self.apart.append(key)
            return
        if seen.statistics is None:
            seen.statistics = self._new(module, key)
        seen.last = weakref.ref(x)
        if self._mode == "expect":
            seen.expected.append(x.detach().clone())
        elif self._mode == "compare" and seen.expected:
            seen.statistics.add(x, seen.expected.pop(0))
        else:
            seen.statistics.add(x)

    def _lead(self, key: Key, x: torch.Tensor) -> _Seen | None:
        """Another weight's layer whose first input was this one, and whose statistics have what is wanted."""
        for other, seen in self._seen.items():
            if seen.calls != 1 or seen.statistics is None or seen.last() is not x or other == key:
                continue
            if seen.statistics.hessian is not None or not _wanted(key, self._hessian):
                return seen
        return None


def _input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))
