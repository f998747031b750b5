"""Collects what algorithms decide by: statistics of layers' inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch

from tcompress.layer_job import Job, Key
from tcompress.statistics import InputStatistics
from tcompress.weights import linear_weight


def layers_by_input(jobs: Sequence[Job], run: Callable[[], None]) -> list[list[Job]]:
    """Layers in the order of their first calls, those together that are given the very same tensors, call by call: Q, K
    and V, or gate and up. Layers with one weight stand together too; those that are never called come last.

    Args:
        run: calls what holds the layers, on one sample.
    """
    given: dict[Key, list[torch.Tensor]] = {}
    with ExitStack() as stack:
        for job in jobs:

            def note(module: Any, args: Any, kwargs: Any, key: Key = job.key) -> None:
                given.setdefault(key, []).append(args[0] if args else next(iter(kwargs.values())))

            stack.callback(job.module.register_forward_pre_hook(note, with_kwargs=True).remove)
        run()
    groups: list[tuple[list[torch.Tensor], list[Job]]] = []
    order = list(given)
    for job in sorted(jobs, key=lambda job: order.index(job.key) if job.key in given else len(order)):
        own = given.get(job.key, [])
        if groups and _same(groups[-1][0], own):
            groups[-1][1].append(job)
        else:
            groups.append((own, [job]))
    return [group for _, group in groups]


def _same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    """Not of layers that were not called: nothing is known of what they are given."""
    return bool(one) and len(one) == len(other) and all(a is b for a, b in zip(one, other, strict=True))


def collect(
    groups: Collection[Collection[Job]],
    run: Callable[[], None],
    pairs: Sequence[tuple[Callable[[], None], Callable[[], None]]] | None = None,
) -> Mapping[Key, InputStatistics]:
    """The statistics of all layers that need them. Layers with one weight share theirs, and so do those of a group of
    `layers_by_input`, as long as they go on being given the same tensors; one that is not gets its own in another run.

    Args:
        run: calls what holds the layers, on all samples.
        pairs: instead, of each sample a call of the original model and one of the compressed one, for layers that make
            up for the difference of their inputs.
    """
    statistics: dict[Key, InputStatistics] = {}
    apart: list[Job] = []
    shares: list[_SharedStatistics] = []
    with ExitStack() as stack:
        for group in groups:
            wanting = [job for job in group if job.needs_statistics]
            if not wanting:
                continue
            first = wanting[0]
            shared = _SharedStatistics(first, any(job.needs_hessian for job in wanting))
            shares.append(shared)
            for job in wanting:
                statistics[job.key] = shared.statistics
                hook = shared.add if job.key == first.key else shared.follow(job, apart)
                stack.callback(job.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for before, after in pairs or ():
            for one in shares:
                one.expect()
            before()
            for one in shares:
                one.compare()
            after()
        if pairs is None:
            run()
    for one in shares:
        apart += [job for job in one.called_otherwise() if job not in apart]
    if apart:
        keys = {job.key for job in apart}
        alone = [[job for job in apart if job.key == key] for key in keys]
        statistics |= collect(alone, run, pairs)
    return statistics


class _SharedStatistics:
    """Statistics of one layer's inputs, and whether other layers are given the same."""

    def __init__(self, job: Job, hessian: bool) -> None:
        weight = linear_weight(job.module)
        self.statistics = InputStatistics(weight.shape[1], hessian, weight.device)
        self._last: torch.Tensor | None = None
        self._expected: list[torch.Tensor] = []
        self._mode = "add"
        self._calls = 0
        self._followers: dict[Key, tuple[Job, int]] = {}

    def expect(self) -> None:
        """What comes next are the original model's inputs of one sample."""
        self._expected, self._mode = [], "expect"

    def compare(self) -> None:
        """What comes next are the compressed model's of the same sample."""
        self._mode = "compare"

    def add(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._last = args[0] if args else next(iter(kwargs.values()))
        self._calls += 1
        if self._mode == "expect":
            self._expected.append(self._last.detach().clone())
        elif self._mode == "compare" and self._expected:
            self.statistics.add(self._last, self._expected.pop(0))
        else:
            self.statistics.add(self._last)

    def follow(self, job: Job, apart: list[Job]) -> Any:
        """A hook that notes a layer which is given something else."""
        self._followers[job.key] = job, 0

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = args[0] if args else next(iter(kwargs.values()))
            self._followers[job.key] = job, self._followers[job.key][1] + 1
            if given is not self._last and job not in apart:
                apart.append(job)

        return hook

    def called_otherwise(self) -> list[Job]:
        """Layers that were called more or less often than the first: experts, on other samples."""
        return [job for job, calls in self._followers.values() if calls != self._calls]
