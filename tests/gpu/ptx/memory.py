"""Global memory, with everything that can be wrong with an access.

It is a row of bytes and arrays of the same length that say what each byte is. An access is `addresses` [n] of `size`
bytes each; only the threads that take part are in it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import Misaligned, OutOfBounds, Race, Uninitialised

Bytes = NDArray[np.uint8]
Addresses = NDArray[np.int64]

#: Where global memory begins: beyond 32 bits, so that an address that lost its upper half is out of bounds.
GLOBAL_BASE = 0x7_2000_0000
#: Unused bytes between two buffers.
GAP = 512
#: Contents that nothing wrote: not a number in every float type, and no small integer.
POISON = 0xFF

UNWRITTEN, WRITTEN = 0, 1
NOBODY = -1


def spread(addresses: Addresses, size: int) -> Addresses:
    """Index of every byte, [n, size]."""
    return addresses[:, None] + np.arange(size)


def first(bad: NDArray[np.bool_], threads: NDArray[np.int64], addresses: Addresses) -> str:
    i = int(np.flatnonzero(bad)[0])
    return f"thread {int(threads[i])}, address {int(addresses[i]):#x}"


def check_alignment(addresses: Addresses, size: int, threads: NDArray[np.int64], what: str) -> None:
    bad = addresses % size != 0
    if bad.any():
        raise Misaligned(f"{what} of {size} bytes: {first(bad, threads, addresses)}")


@dataclass(frozen=True)
class Buffer:
    """An array in global memory. `valid` marks the bytes that a kernel may touch, `written` those it may read."""

    address: int
    data: Bytes


class GlobalMemory:
    """Buffers with gaps between. Blocks of a launch run one after another, in truth at once: a byte that one of them
    writes and another one reads or writes, atomics apart, is a race, unless the first one released it and the other one
    acquired it: by an atomic that says so or by a fence."""

    def __init__(self) -> None:
        self._buffers: list[tuple[int, Bytes, NDArray[np.bool_], NDArray[np.bool_]]] = []
        self._end = GAP
        self._ready = False

    def add(
        self,
        data: Bytes,
        valid: NDArray[np.bool_] | None = None,
        written: bool | NDArray[np.bool_] = True,
        misalign: int = 0,
    ) -> int:
        """Address of a copy of `data`, a row of bytes.

        Args:
            valid: which of them may be touched; all by default.
            written: which of them hold values: to read another one before it is written is an error.
            misalign: bytes by which the address misses a multiple of 256.
        """
        if self._ready:
            raise RuntimeError("GlobalMemory: a buffer was added after the launch")
        start = -(-self._end // 256) * 256 + misalign
        ok = np.ones(data.size, bool) if valid is None else valid
        holds = np.broadcast_to(written, (data.size,))
        self._buffers.append((start, np.where(holds, data, np.uint8(POISON)), ok, holds))
        self._end = start + data.size + GAP
        return GLOBAL_BASE + start

    def freeze(self) -> None:
        """Lays the buffers out; before the launch."""
        size = -(-(self._end + GAP) // 256) * 256
        self.bytes = np.full(size, POISON, np.uint8)
        self.valid = np.zeros(size, bool)
        self.state = np.zeros(size, np.uint8)
        self.writer = np.full(size, NOBODY, np.int32)
        self.has_unwritten = False
        for start, data, ok, written in self._buffers:
            end = start + data.size
            self.bytes[start:end], self.valid[start:end], self.state[start:end] = data, ok, written
            self.has_unwritten = self.has_unwritten or not written.all()
        self._views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        # invalid bytes before each byte: an access is inside where the count does not change
        self._invalid = np.concatenate([[0], np.cumsum(~self.valid)])
        self._ready = True

    def allow_unwritten(self) -> None:
        """From now on reads of what nothing wrote are no errors. They give `POISON`."""
        self.state[self.valid] = WRITTEN
        self.has_unwritten = False

    def new_launch(self) -> None:
        self.writer[:] = NOBODY
        self.published = np.zeros(self.bytes.size, bool)
        self.new_block()

    def new_block(self) -> None:
        self.visible = np.zeros(self.bytes.size, bool)

    def release(self, block: int) -> None:
        """What the block has written so far is there for who acquires it."""
        self.published |= self.writer == block

    def acquire(self) -> None:
        """The running block sees what was released."""
        self.visible |= self.published

    def _of_others(self, index: Addresses, block: int) -> NDArray[np.bool_]:
        """Which accesses [n] touch what another block wrote and this one does not see in order."""
        writer = self.writer[index]
        return ((writer != NOBODY) & (writer != block) & ~self.visible[index]).any(1)

    def content(self, address: int, size: int) -> Bytes:
        start = address - GLOBAL_BASE
        return self.bytes[start : start + size].copy()

    def written(self, address: int, size: int) -> NDArray[np.bool_]:
        start = address - GLOBAL_BASE
        return self.state[start : start + size] == WRITTEN

    def _check(self, addresses: Addresses, size: int, threads: NDArray[np.int64], what: str) -> Addresses:
        at = addresses - GLOBAL_BASE
        bad = (at < 0) | (at > self.bytes.size - size)
        if not bad.any():
            bad = self._invalid[at + size] != self._invalid[at]
        if bad.any():
            raise OutOfBounds(f"{what} of {size} bytes: {first(bad, threads, addresses)}")
        check_alignment(addresses, size, threads, what)
        return at

    def load(
        self, addresses: Addresses, size: int, width: int, threads: NDArray[np.int64], block: int
    ) -> NDArray[np.generic]:
        """[n, size / width] raw integers of `width` bytes."""
        at = self._check(addresses, size, threads, "global load")
        return self._read(at, addresses, size, width, threads, block)

    def load_part(
        self, addresses: Addresses, sizes: NDArray[np.int64], size: int, threads: NDArray[np.int64], block: int
    ) -> Bytes:
        """[n, size] bytes, those of a thread from `sizes` on zero: what cp.async reads."""
        check_alignment(addresses[sizes > 0], size, threads[sizes > 0], "cp.async source")
        out = np.zeros((addresses.size, size), np.uint8)
        for n in np.unique(sizes[sizes > 0]):
            some = sizes == n
            at = addresses[some] - GLOBAL_BASE
            bad = (at < 0) | (at > self.bytes.size - n)
            if not bad.any():
                bad = self._invalid[at + n] != self._invalid[at]
            if bad.any():
                raise OutOfBounds(f"cp.async source of {n} bytes: {first(bad, threads[some], addresses[some])}")
            out[some, : int(n)] = self._read(at, addresses[some], int(n), 1, threads[some], block)
        return out

    def _read(
        self, at: Addresses, addresses: Addresses, size: int, width: int, threads: NDArray[np.int64], block: int
    ) -> NDArray[np.generic]:
        if self.has_unwritten or (self.writer[at] != NOBODY).any():
            index = spread(at, size)
            bad = (self.state[index] != WRITTEN).any(1)
            if bad.any():
                raise Uninitialised(f"global load: {first(bad, threads, addresses)}")
            bad = self._of_others(index, block)
            if bad.any():
                raise Race(f"global load of what another block wrote: {first(bad, threads, addresses)}")
        return self._views[width][at[:, None] // width + np.arange(size // width)]

    def store(self, addresses: Addresses, values: NDArray[np.generic], threads: NDArray[np.int64], block: int) -> None:
        """values [n, k]: k neighbours a thread."""
        width = values.dtype.itemsize
        size = values.shape[1] * width
        at = self._check(addresses, size, threads, "global store")
        index = spread(at, size)
        bad = self._of_others(index, block)
        if bad.any():
            raise Race(f"global store to what another block wrote: {first(bad, threads, addresses)}")
        self.writer[index], self.state[index], self.published[index] = block, WRITTEN, False
        places = at[:, None] // width + np.arange(values.shape[1])
        self._views[width][places] = values
        bad = (self._views[width][places] != values).any(1)
        if bad.any():
            raise Race(f"two threads store different values at once: {first(bad, threads, addresses)}")

    def cell(self, address: int, width: int, thread: int) -> tuple[NDArray[np.generic], int]:
        """View and index of one value, for an atomic."""
        one = np.array([address], np.int64)
        at = self._check(one, width, np.array([thread]), "atomic")
        if (self.state[at[0] : at[0] + width] != WRITTEN).any():
            raise Uninitialised(f"atomic: thread {thread}, address {address:#x}")
        return self._views[width], int(at[0]) // width
