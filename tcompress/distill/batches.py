"""The batches of a training, in an order that a seed decides and that can be taken up in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from tcompress.calibrate import batches as as_batches
from tcompress.errors import message


class Batches:
    """Goes through data again and again.

    Args:
        data: what `calibrate.batches` takes. A list, or what can be gone through but once, is held and shuffled for
            each round; a DataLoader or another iterable is gone through each time in its own order, torch's random
            numbers and the loader's own generator being seeded for the round.
        seed: of the order.
        process, processes: which of several that share the batches this is.

    Raises:
        TypeError: not iterable. ValueError: no batches.
    """

    def __init__(self, data: Any, seed: int, process: int = 0, processes: int = 1) -> None:
        again = isinstance(data, Iterable) and not isinstance(data, torch.Tensor | Mapping | tuple | list | str)
        #: The batches as a list, or None where the data are gone through again and again.
        self.held = None if again and iter(data) is not data else list(as_batches(data))
        self._data, self._seed = data, seed
        self._process, self._processes = process, processes
        self.first = self.held[0] if self.held is not None else next(self._round(0), None)
        if self.first is None:
            raise ValueError(message("distill", "data", "no batches", "at least one"))

    def after(self, taken: int) -> Iterator[Any]:
        """The batches of this process without the first ones, without end."""
        index, round_ = taken * self._processes + self._process, 0
        if self.held is not None:
            n = len(self.held)
            while True:
                order = torch.randperm(n, generator=self._generator(index // n))
                yield self.held[int(order[index % n])]
                index += self._processes
        place = 0  # of the next batch, over all rounds
        while True:
            before = place
            for batch in self._round(round_):
                if place == index:
                    yield batch
                    index += self._processes
                place += 1
            if place == before:
                raise ValueError(message("distill", "data", f"no batches in round {round_ + 1}", "at least one"))
            round_ += 1

    def _round(self, round_: int) -> Iterator[Any]:
        """A loader draws its order when it is begun; what it draws later comes from the training's own state."""
        own = getattr(self._data, "generator", None)
        if isinstance(own, torch.Generator):
            own.manual_seed(self._generator(round_).initial_seed())
        with torch.random.fork_rng():
            torch.manual_seed(self._generator(round_).initial_seed())
            loader = iter(self._data)
            batch = next(loader, None)
        if batch is not None:
            yield batch
            yield from loader

    def _generator(self, round_: int) -> torch.Generator:
        return torch.Generator().manual_seed((self._seed << 32) + round_)
