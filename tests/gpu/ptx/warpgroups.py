"""What the warpgroups of a block have under way: products (wgmma) and the registers and shared memory that they hold.

ISA 9.7.15.7, wgmma.fence, commit_group, wait_group. Results are computed when a product is issued; what the ISA says
about when they may be used is checked here:

    the accumulator and the registers of A may not be read or written before a wait for the product's group, except by
    products of the same shape that go on with the same accumulator
    a register that other instructions have touched needs a wgmma.fence before a product uses it

A `mov` hands on what its source needs and is nothing in itself: compilers leave copies and constants behind the fence,
for ptxas to place.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from .errors import AsyncNotWaited, MissingFence
from .memory import Addresses
from .program import Register
from .shared_memory import SharedMemory

#: What a product of no other shape may share: the registers of A.
OF_A = "A"


@dataclass
class _Warpgroup:
    """touched: registers (their indices) since the last fence. held: by products, as what, and the product's group.
    reads: of shared memory, with their group."""

    fenced: bool = False
    committed: int = 0
    touched: set[int] = field(default_factory=set)
    held: dict[int, tuple[str, int]] = field(default_factory=dict)
    reads: list[tuple[int, Addresses]] = field(default_factory=list)


class Warpgroups:
    def __init__(self, threads: int) -> None:
        self.state = [_Warpgroup() for _ in range(-(-threads // 128))]

    def touch(self, groups: Iterable[int], registers: frozenset[int]) -> None:
        """An instruction other than a product reads or writes these."""
        for g in groups:
            state = self.state[g]
            self._free(g, registers)
            state.touched |= registers

    def copy(self, groups: Iterable[int], to: int, origin: int | None, all_threads: bool) -> None:
        """A mov; origin: the register it reads, if there is one."""
        for g in groups:
            touched = self.state[g].touched
            self._free(g, (to,) if origin is None else (to, origin))
            if origin in touched:
                touched.add(to)
            elif all_threads:
                touched.discard(to)

    def _free(self, group: int, registers: Iterable[int]) -> None:
        held = self.state[group].held
        if held and not held.keys().isdisjoint(registers):
            raise AsyncNotWaited(f"a register of a wgmma that warpgroup {group} has not waited for")

    def fence(self, groups: Iterable[int]) -> None:
        for g in groups:
            self.state[g].fenced = True
            self.state[g].touched.clear()

    def issue(self, group: int, shape: str, d: list[Register], a: list[Register]) -> None:
        """Of a product, before anything is read: its registers."""
        state = self.state[group]
        if not state.fenced:
            raise MissingFence(f"the first wgmma of warpgroup {group} without a wgmma.fence")
        for registers, kind in ((d, shape), (a, OF_A)):
            for r in registers:
                if r.index in state.touched:
                    raise MissingFence(f"{r.name} was used since the last wgmma.fence of warpgroup {group}")
                if r.index in state.held and state.held[r.index][0] != kind:
                    raise AsyncNotWaited(f"{r.name} of another wgmma that warpgroup {group} has not waited for")
                state.held[r.index] = kind, state.committed

    def reads(self, group: int, index: Addresses) -> None:
        """It holds these bytes of shared memory."""
        self.state[group].reads.append((self.state[group].committed, index))

    def commit(self, groups: Iterable[int]) -> None:
        for g in groups:
            self.state[g].committed += 1

    def wait(self, groups: Iterable[int], keep: int, shared: SharedMemory) -> None:
        """Until at most the last `keep` committed groups are under way; what was not committed stays."""
        for g in groups:
            state = self.state[g]
            limit = state.committed - keep
            state.held = {r: (kind, n) for r, (kind, n) in state.held.items() if n >= limit}
            for n, index in state.reads:
                if n < limit:
                    shared.end_read(index)
            state.reads = [(n, index) for n, index in state.reads if n >= limit]
