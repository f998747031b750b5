"""What the emulator reports: one class a kind of defect, so that a test can name the one it expects."""

from __future__ import annotations


class PtxError(Exception):
    """Base of all. The message ends with the line of PTX and, where there is one, the thread."""


class UnknownPtx(PtxError):
    """An instruction, modifier, operand or directive that is not modelled. Nothing is guessed."""


class OutOfBounds(PtxError):
    """An access to bytes that belong to no buffer, or to shared memory beyond what was launched."""


class Misaligned(PtxError):
    """An address that is no multiple of the size of its access."""


class Uninitialised(PtxError):
    """A read of shared memory, of a buffer or of a register that nothing has written."""


class AsyncNotWaited(PtxError):
    """An access to shared memory to which a cp.async is still on its way, or to what a wgmma that nobody waited for
    reads or writes: registers, shared memory."""


class MissingFence(PtxError):
    """A wgmma without the fence that orders it behind what its registers or its shared memory were written by."""


class Race(PtxError):
    """Two warps, or two blocks, and nothing that orders their accesses, one of which is a write."""


class InvalidOperand(PtxError):
    """A value for which the ISA gives an instruction no result."""


class Endless(PtxError):
    """A block that does not come to its end."""


class DivergentBarrier(PtxError):
    """A barrier that not all threads of the block reach together."""


class DivergentWarp(PtxError):
    """A warp instruction whose members are not all there, or that reads a lane which is not."""
