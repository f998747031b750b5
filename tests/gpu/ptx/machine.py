"""One block of threads: registers, shared memory, copies under way, and the loop that runs it.

All threads run in step as vectors; where they diverge, `flow` says who waits. Only what the block's threads do between
themselves is modelled, in one order: see `ptx.__init__`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import DivergentBarrier, Endless, PtxError, Uninitialised
from .flow import BasicBlock, ends_block
from .memory import GlobalMemory
from .program import Kernel
from .shared_memory import SharedMemory
from .types import Array, Mask
from .warpgroups import Warpgroups

#: Of registers that a thread has not written, when others have: no number in any float type, no small integer.
POISON_BITS = 0xFFE7FFE7FFE7FFE7

#: Of a block; our kernels' tests need a hundredth. It takes the emulator half a minute.
MOST_INSTRUCTIONS = 1_000_000

Execute = Callable[["Machine", Mask], None]


@dataclass
class Decoded:
    """A kernel ready to run. steps: of each basic block, without what ends it; and the number of each instruction.
    guards: of the branch or exit that ends it. has_warpgroups: whether it has products of warpgroups."""

    kernel: Kernel
    blocks: list[BasicBlock]
    steps: list[list[tuple[Execute, int]]]
    guards: list[Callable[[Machine], NDArray[np.bool_]] | None]
    has_warpgroups: bool = False


@dataclass
class Copy:
    """A cp.async: bytes [n, size] for `addresses` [n] of `threads` [n], which issued it in their group `groups` [n]."""

    threads: NDArray[np.int64]
    addresses: NDArray[np.int64]
    values: NDArray[np.uint8]
    groups: NDArray[np.int64]


@dataclass
class Machine:
    """State of a block. parameters: their bytes."""

    decoded: Decoded
    memory: GlobalMemory
    parameters: NDArray[np.uint8]
    block: tuple[int, int, int]
    grid: tuple[int, int, int]
    shape: tuple[int, int, int]
    shared_bytes: int
    block_number: int = 0
    registers: list[Array | None] = field(default_factory=list)
    executed: int = 0

    def __post_init__(self) -> None:
        x, y, z = self.shape
        self.threads = x * y * z
        self.ids = np.arange(self.threads)
        warps = -(-self.threads // 32) if self.decoded.has_warpgroups else 0
        self.shared = SharedMemory(self.decoded.kernel.dynamic + self.shared_bytes, warps)
        self.warpgroups = Warpgroups(self.threads)
        self.registers = [None] * len(self.decoded.kernel.register_types)
        self.copies: list[Copy] = []
        self.group = np.zeros(self.threads, np.int64)
        # padded to whole warps: a lane that does not exist never takes part
        self.lanes = -(-self.threads // 32) * 32
        self.special = self._special()

    def _special(self) -> dict[str, Array]:
        ids = self.ids.astype(np.uint32)
        x, y, _ = self.shape
        lane = ids % 32
        everywhere = np.zeros(self.threads, np.uint32)
        out: dict[str, Array] = {
            "tid.x": ids % x, "tid.y": ids // x % y, "tid.z": ids // (x * y), "laneid": lane, "warpid": ids // 32,
            "nwarpid": everywhere + self.lanes // 32, "smid": everywhere, "nsmid": everywhere + 1,
        }  # fmt: skip
        for axis, name in enumerate("xyz"):
            for register, value in (("ntid", self.shape), ("ctaid", self.block), ("nctaid", self.grid)):
                out[f"{register}.{name}"] = everywhere + np.uint32(value[axis])
        bit = np.uint32(1) << lane
        below = bit - np.uint32(1)
        out |= {
            "lanemask_eq": bit, "lanemask_lt": below, "lanemask_le": below | bit, "lanemask_gt": ~(below | bit),
            "lanemask_ge": ~below,
        }  # fmt: skip
        return {name: value.astype(np.uint32) for name, value in out.items()}

    def read(self, index: int) -> Array:
        """A register's value. Of one that nothing has written it is poison: compilers read such registers where the
        result does not depend on them (LLVM's undef), so that this alone is no defect."""
        value = self.registers[index]
        if value is None:
            raw = self.decoded.kernel.register_types[index].raw
            return np.full(self.threads, POISON_BITS & ((1 << 8 * raw.itemsize) - 1), raw)
        return value

    def read_written(self, index: int) -> Array:
        """A register that says where to go or what to touch."""
        value = self.registers[index]
        if value is None:
            raise Uninitialised("a predicate or an address that no thread has written")
        return value

    def write(self, index: int, value: Array, mask: Mask) -> None:
        """value: raw, of the register's width. Registers are never changed in place, so a value may be shared."""
        if mask is not None:
            old = self.registers[index]
            if old is None:
                poison = POISON_BITS & ((1 << 8 * value.itemsize) - 1)
                old = np.array(False if value.dtype == bool else poison, value.dtype)
            value = np.where(mask, value, old)
        self.registers[index] = self.vector(value)

    def vector(self, value: Array) -> Array:
        """[threads], of a vector or of a constant."""
        return value if value.ndim else np.full(self.threads, value)

    def active(self, mask: Mask) -> NDArray[np.int64]:
        """Numbers of the threads that take part."""
        return self.ids if mask is None else np.flatnonzero(mask)

    def wait_copies(self, keep: int | None, mask: Mask) -> None:
        """cp.async.wait_group `keep`; None: of all, committed or not."""
        taking = np.ones(self.threads, bool) if mask is None else mask
        limit = np.where(taking, self.group - keep if keep is not None else self.group + 1, 0)
        left = []
        for copy in self.copies:
            done = copy.groups < limit[copy.threads]
            if done.any():
                self.shared.end_copy(copy.addresses[done], copy.values[done], copy.threads[done])
            if not done.all():
                rest = ~done
                left.append(Copy(copy.threads[rest], copy.addresses[rest], copy.values[rest], copy.groups[rest]))
        self.copies = left

    def run(self) -> None:
        """All threads to their end."""
        with np.errstate(all="ignore"):
            _Schedule(self).run()


class _Schedule:
    """Which threads run which basic block next."""

    def __init__(self, machine: Machine) -> None:
        self.m = machine
        self.d = machine.decoded
        self.end = len(self.d.blocks)
        self.at = np.zeros(machine.threads, np.int64)
        self.waiting = np.zeros(machine.threads, bool)
        self.ranks = np.array([*(b.rank for b in self.d.blocks), self.end])

    def run(self) -> None:
        together: int | None = 0
        while together != self.end:
            if together is not None:
                together = self._step(together, None)
                continue
            picked = self._pick()
            if picked is None:
                return
            block, mask = picked
            together = self._step(block, None if mask.all() else mask)

    def _pick(self) -> tuple[int, NDArray[np.bool_]] | None:
        """The block of lowest rank that threads are at, and those; None when all have ended."""
        ready = (self.at < self.end) & ~self.waiting
        if ready.any():
            where = self.at[ready]
            block = int(where[np.argmin(self.ranks[where])])
            return block, ready & (self.at == block)
        live = (self.at < self.end) | self.waiting
        if not live.any():
            return None
        if not live.all():
            raise DivergentBarrier(
                f"thread {int(np.flatnonzero(~live)[0])} has ended and others wait; {self._barriers(live)}"
            )
        if np.unique(self.at).size > 1:
            raise DivergentBarrier(f"threads wait at different barriers; {self._barriers(live)}")
        self._release()
        block = int(self.at[0])
        return block, np.ones(self.m.threads, bool)

    def _barriers(self, live: NDArray[np.bool_]) -> str:
        # threads that wait are already at the block behind
        places = {self.d.kernel.instructions[self.d.blocks[int(b) - 1].end - 1].where() for b in self.at[live]}
        return f"block {self.m.block}; {' | '.join(sorted(places))}"

    def _release(self) -> None:
        self.waiting[:] = False
        self.m.shared.barrier()

    def _step(self, number: int, mask: Mask) -> int | None:
        """Runs a block; the next one if all threads are together there, else None and `at` says where each is."""
        m, block = self.m, self.d.blocks[number]
        at = block.start
        guard = self.d.guards[number]
        try:
            for execute, index in self.d.steps[number]:
                at = index
                execute(m, mask)
            at = block.end - 1
            taken = None if guard is None else guard(m)
            m.executed += block.end - block.start
            if m.executed > MOST_INSTRUCTIONS:
                raise Endless(f"more than {MOST_INSTRUCTIONS} instructions")
        except PtxError as error:
            where = self.d.kernel.instructions[at].where()
            raise type(error)(f"{error}; block {m.block}; {where}") from None
        last = self.d.kernel.instructions[block.end - 1]
        if last.opcode == "bra":
            target = block.target
            assert target is not None
            if taken is None:
                return self._move(mask, target)
            following = number + 1
            if mask is None:
                if taken.all():
                    return target
                if not taken.any():
                    return following
                self.at[:] = np.where(taken, target, following)
                return None
            self.at[mask] = np.where(taken, target, following)[mask]
            return None
        if last.opcode in ("ret", "exit"):
            ending = np.ones(m.threads, bool) if taken is None else taken
            if mask is None and ending.all():
                return self.end
            self.at[slice(None) if mask is None else mask] = number + 1
            self.at[ending if mask is None else ending & mask] = self.end
            return None
        if ends_block(last):
            return self._wait(number, mask, last.where())
        return self._move(mask, number + 1)

    def _move(self, mask: Mask, to: int) -> int | None:
        if mask is None:
            return to
        self.at[mask] = to
        return None

    def _wait(self, number: int, mask: Mask, where: str) -> int | None:
        if mask is None:
            self.m.shared.barrier()
            return number + 1
        warps = np.unique(np.flatnonzero(mask) // 32)
        for warp in warps:
            lanes = slice(int(warp) * 32, int(warp) * 32 + 32)
            if not mask[lanes].all():
                missing = int(warp) * 32 + int(np.flatnonzero(~mask[lanes])[0])
                raise DivergentBarrier(
                    f"warp {int(warp)} is not all at the barrier, thread {missing} is not; "
                    f"block {self.m.block}; {where}"
                )
        self.at[mask] = number + 1
        self.waiting |= mask
        return None
