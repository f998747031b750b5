"""A model as a sequence of blocks, each of which can be run alone on what the ones before it gave."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from tcompress.activations import Kept, tensors_in
from tcompress.calibrate import run
from tcompress.memory import trim, trimmed_between_blocks


class _Reached(Exception):
    """Ends a model's forward after the block that was wanted."""


def find_chains(
    model: nn.Module, batch: Any, wanted: Callable[[list[nn.Module]], bool] = lambda blocks: True
) -> list[list[nn.Module]]:
    """The sequences of blocks in a model, in the order in which they run.

    A chain is a `torch.nn.ModuleList` of two or more members that were each called once on this batch (one that stands
    at several places, once at each), in order, one after the other's end, each with the first tensor that the one
    before returned; nothing that an earlier one returned may go past it, unless that one hands it on; and all return
    alike, so that one can hand out what another returned. Chains do not lie in one another, and the longer of two is
    taken.

    Args:
        wanted: whether a list may be taken.
    """
    lists = {id(m): m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1}
    lists = {key: m for key, m in lists.items() if wanted(list(m))}
    members = {member for m in lists.values() for member in m}
    calls: list[tuple[nn.Module, int, int, list[int], list[int], Any]] = []
    #: A tensor is known by a number: all that blocks return would be held until the end.
    numbers: Any = WeakTensorKeyDictionary()
    clock, count = 0, itertools.count()
    with ExitStack() as stack:
        starts: dict[nn.Module, list[int]] = {}

        def before(module: nn.Module, *_: Any) -> None:
            nonlocal clock
            clock += 1
            starts.setdefault(module, []).append(clock)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal clock
            clock += 1
            given, returned = (
                [numbers.setdefault(t, next(count)) for t in tensors_in(v)] for v in ((args, kwargs), output)
            )
            calls.append((module, starts[module].pop(), clock, given, returned, _shape_of(output)))

        for member in members:
            stack.callback(member.register_forward_pre_hook(before).remove)
            stack.callback(member.register_forward_hook(after, with_kwargs=True).remove)
        trim()
        stack.enter_context(trimmed_between_blocks(model))
        run(model, batch)
    trim()
    found = [list(m) for m in lists.values() if _is_chain(list(m), calls)]
    found.sort(key=len, reverse=True)
    chosen: list[list[nn.Module]] = []
    for chain in found:
        inside = {m for block in chain for m in block.modules()}
        if not any(inside & {m for block in other for m in block.modules()} for other in chosen):
            chosen.append(chain)
    first = {call[0]: call[1] for call in reversed(calls)}
    return sorted(chosen, key=lambda chain: first[chain[0]])


def _is_chain(members: Sequence[nn.Module], calls: list[Any]) -> bool:
    own = [call for call in calls if call[0] in set(members)]
    if [call[0] for call in own] != list(members):
        return False
    if any(call[-1] != own[0][-1] for call in own):
        return False
    returned: list[set[int]] = []
    for i, (_, start, _, given, output, _) in enumerate(own):
        if i:
            _, _, end, _, previous, _ = own[i - 1]
            # The very tensor: one that was changed on the way would not come from the block before.
            if start < end or not previous or previous[0] not in given:
                return False
            past = set().union(*returned[:-1]) - returned[-1]
            if past.intersection(given):
                return False
        returned.append(set(output))
    return True


def _shape_of(output: Any) -> Any:
    """A block's output without its values: how it is nested."""
    if isinstance(output, Mapping):
        return type(output), {key: _shape_of(item) for key, item in output.items()}
    if isinstance(output, tuple | list):
        return type(output), [_shape_of(item) for item in output]
    return isinstance(output, torch.Tensor)


class BlockRunner:
    """Runs the blocks of a model one by one on a list of batches, keeping one block's outputs.

    The model's own forward is called each time, so that each block gets the masks and positions that it always gets;
    blocks that are done hand out what the last of them returned, and the forward ends after the wanted block.

    Args:
        model: in evaluation mode.
        chains: of `find_chains`.
        batches: as for `calibrate.run`.
        folder: where a block's outputs go; None keeps them in memory.
    """

    def __init__(
        self, model: nn.Module, chains: list[list[nn.Module]], batches: list[Any], folder: Path | None = None
    ) -> None:
        self.model, self.chains, self.batches = model, chains, batches
        #: What the last block that is done returned, by chain and batch.
        self._outputs = [Kept(folder, f"block-{id(self)}-{chain}") for chain in range(len(chains))]

    def run(self, chain: int, block: int, keep: bool, only: int | None = None) -> None:
        """Calls a block on all batches, or on one; if asked, what it returns is kept, and is what the next one gets."""
        wanted = self.chains[chain][block]
        trim()
        for i, batch in enumerate(self.batches):
            if only is not None and i != only:
                continue
            with self._done(chain, block, i), ExitStack() as stack:
                caught: list[Any] = []

                def stop(module: nn.Module, args: Any, output: Any, caught: list[Any] = caught) -> None:
                    caught.append(output)
                    raise _Reached

                stack.callback(wanted.register_forward_hook(stop).remove)
                with suppress(_Reached):
                    run(self.model, batch)
                if keep and caught:
                    self._outputs[chain][i] = caught[0]

    def outputs(self, chain: int) -> Kept:
        """What the last block of a chain that is done returned, by batch."""
        return self._outputs[chain]

    def run_rest(self) -> None:
        """Calls what is outside of the blocks, all of which are done."""
        trim()
        for i, batch in enumerate(self.batches):
            with self._done(len(self.chains), 0, i):
                run(self.model, batch)

    @contextmanager
    def _done(self, chain: int, block: int, batch: int) -> Iterator[None]:
        """Makes the blocks before this one hand out what the last of their chain returned."""
        with ExitStack() as stack:
            for index, blocks in enumerate(self.chains[: chain + 1]):
                if done := blocks if index < chain else blocks[:block]:
                    output = self._outputs[index][batch]  # a block may write into what it is given
                    for other in done:
                        stack.enter_context(forward_replaced(other, _constant(output)))
            yield


def _constant(output: Any) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return output

    return forward


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """A module with another forward for a while."""
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = before
