"""A block's shared memory: `memory`, and who may touch a byte since when.

Copies (cp.async) that are on their way hold their bytes; products of a warpgroup (wgmma) read through the async proxy,
which sees what was written before a fence.proxy.async (ISA 8.10 and 9.7.15.5), and hold what they read until they are
waited for.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .errors import AsyncNotWaited, MissingFence, OutOfBounds, Race, Uninitialised
from .memory import NOBODY, POISON, WRITTEN, Addresses, Bytes, check_alignment, first, spread

PENDING = 2
SEVERAL = -2


class SharedMemory:
    """A block's. Who wrote and who read a byte since the last barrier is kept by warp: the threads of a warp are taken
    to run in step.

    warps: of the block, where products of warpgroups read this memory; 0 where nothing has to be kept for them.
    """

    def __init__(self, size: int, warps: int = 0) -> None:
        padded = -(-size // 16) * 16
        self.size = size
        self.bytes = np.full(padded, POISON, np.uint8)
        self.state = np.zeros(padded, np.uint8)
        self.writer = np.full(padded, NOBODY, np.int16)
        self.reader = np.full(padded, NOBODY, np.int16)
        self._views = {n: self.bytes.view(f"u{n}") for n in (1, 2, 4, 8)}
        # a bit for each warp whose asynchronous reads do not see a byte's last write yet
        self._all_warps = np.uint32((1 << warps) - 1)
        self._unseen = np.zeros(padded if warps else 0, np.uint32)
        self._read_by_products = np.zeros(self._unseen.size, np.int16)

    def barrier(self) -> None:
        if self._unseen.size:
            # the fence of one warp, its own write or a barrier before it, is on the way to all that come behind; of
            # what several wrote, which may be any of them, all have to have had one
            some = np.where(self.writer == SEVERAL, self._unseen == 0, self._unseen != self._all_warps)
            self._unseen[:] = np.where(some, np.uint32(0), self._all_warps)
        self.writer[:] = NOBODY
        self.reader[:] = NOBODY

    def check(self, addresses: Addresses, size: int, threads: NDArray[np.int64], what: str) -> None:
        bad = (addresses < 0) | (addresses > self.size - size)
        if bad.any():
            raise OutOfBounds(f"{what} of {size} bytes: {first(bad, threads, addresses)}")
        check_alignment(addresses, size, threads, what)

    def load(self, addresses: Addresses, size: int, width: int, threads: NDArray[np.int64]) -> NDArray[np.generic]:
        """[n, size / width] raw integers of `width` bytes."""
        self.check(addresses, size, threads, "shared load")
        index = spread(addresses, size)
        state = self.state[index]
        if (state != WRITTEN).any():
            bad = (state == PENDING).any(1)
            if bad.any():
                raise AsyncNotWaited(f"shared load before the copy was waited for: {first(bad, threads, addresses)}")
            raise Uninitialised(f"shared load: {first((state != WRITTEN).any(1), threads, addresses)}")
        warps = (threads // 32).astype(np.int16)[:, None]
        writer = self.writer[index]
        bad = ((writer != NOBODY) & (writer != warps)).any(1)
        if bad.any():
            raise Race(f"shared load of what another warp wrote since the barrier: {first(bad, threads, addresses)}")
        reader = self.reader[index]
        self.reader[index] = np.where((reader == NOBODY) | (reader == warps), warps, SEVERAL)
        # of several warps in this instruction the last one is kept
        lost = self.reader[index] != warps
        if lost.any():
            self.reader[index[lost]] = SEVERAL
        return self._views[width][addresses[:, None] // width + np.arange(size // width)]

    def _mark_write(self, index: Addresses, addresses: Addresses, threads: NDArray[np.int64], what: str) -> None:
        warps = (threads // 32).astype(np.int16)[:, None]
        bad = (self.state[index] == PENDING).any(1)
        if bad.any():
            raise AsyncNotWaited(f"{what} to where a copy is on its way: {first(bad, threads, addresses)}")
        if self._unseen.size:
            bad = (self._read_by_products[index] > 0).any(1)
            if bad.any():
                raise AsyncNotWaited(f"{what} to what a wgmma still reads: {first(bad, threads, addresses)}")
            self._unseen[index] = self._all_warps
        for kept, verb in ((self.writer, "wrote"), (self.reader, "read")):
            owner = kept[index]
            bad = ((owner != NOBODY) & (owner != warps)).any(1)
            if bad.any():
                raise Race(f"{what} to what another warp {verb} since the barrier: {first(bad, threads, addresses)}")
        self.writer[index] = warps
        # Triton lets several warps store the same value in one instruction; `store` finds different ones
        lost = self.writer[index] != warps
        if lost.any():
            self.writer[index[lost]] = SEVERAL

    def store(self, addresses: Addresses, values: NDArray[np.generic], threads: NDArray[np.int64]) -> None:
        """values [n, k]: k neighbours a thread."""
        width = values.dtype.itemsize
        size = values.shape[1] * width
        self.check(addresses, size, threads, "shared store")
        index = spread(addresses, size)
        self._mark_write(index, addresses, threads, "shared store")
        self.state[index] = WRITTEN
        places = addresses[:, None] // width + np.arange(values.shape[1])
        self._views[width][places] = values
        bad = (self._views[width][places] != values).any(1)
        if bad.any():
            raise Race(f"two threads store different values at once: {first(bad, threads, addresses)}")

    def begin_copy(self, addresses: Addresses, size: int, threads: NDArray[np.int64]) -> None:
        """cp.async: from now on the bytes are neither the old ones nor the new."""
        self.check(addresses, size, threads, "cp.async destination")
        index = spread(addresses, size)
        self._mark_write(index, addresses, threads, "cp.async")
        self.state[index] = PENDING
        self.bytes[index] = POISON

    def end_copy(self, addresses: Addresses, values: Bytes, threads: NDArray[np.int64]) -> None:
        """The bytes [n, size] arrive: for the warp that waited; others need a barrier."""
        index = spread(addresses, values.shape[1])
        self.state[index] = WRITTEN
        self._mark_write(index, addresses, threads, "arrival of cp.async")
        self.bytes[index] = values

    def proxy_fence(self, warps: NDArray[np.int64]) -> None:
        """fence.proxy.async by these warps: their asynchronous reads see from now on what they see themselves."""
        if self._unseen.size == 0:
            return
        bits = np.bitwise_or.reduce(np.uint32(1) << warps.astype(np.uint32))
        own = np.where(self.writer < 0, bits, np.uint32(1) << np.maximum(self.writer, 0).astype(np.uint32) & bits)
        self._unseen &= ~np.where(self.state == WRITTEN, own, np.uint32(0))

    def begin_read(self, index: Addresses, warps: NDArray[np.int64], what: str) -> Bytes:
        """Bytes that a product of these warps reads from now on, until `end_read`. index: each once."""
        bad = (index < 0) | (index >= self.size)
        if bad.any():
            raise OutOfBounds(f"{what}: address {int(index[bad][0]):#x}")
        state = self.state[index]
        if (state != WRITTEN).any():
            if (state == PENDING).any():
                raise AsyncNotWaited(
                    f"{what} before the copy was waited for: address {int(index[state == PENDING][0]):#x}"
                )
            raise Uninitialised(f"{what}: address {int(index[state != WRITTEN][0]):#x}")
        # its own four warps are not in step either
        bad = self.writer[index] != NOBODY
        if bad.any():
            raise Race(f"{what} of what a warp wrote since the barrier: address {int(index[bad][0]):#x}")
        bits = np.bitwise_or.reduce(np.uint32(1) << warps.astype(np.uint32))
        bad = self._unseen[index] & bits != 0
        if bad.any():
            raise MissingFence(f"{what} of what no fence.proxy.async follows: address {int(index[bad][0]):#x}")
        self.reader[index] = SEVERAL
        self._read_by_products[index] += 1
        return self.bytes[index]

    def end_read(self, index: Addresses) -> None:
        self._read_by_products[index] -= 1
