"""GPUs in numbers: what fits a multiprocessor at a time, and how fast its parts are at best.

Limits of a multiprocessor: NVIDIA, CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
Rates: NVIDIA's data sheets of the cards and white papers of the architectures, dense products, at the boost clock. They
are bounds, not measurements.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
#: Registers are handed out to a warp in units of this many, each thread's in eights; a multiprocessor has four parts.
REGISTER_UNIT, PARTS = 256, 4
#: Shared memory is handed out in units of so many bytes, and the system takes 1 KiB of it for every block.
SHARED_UNIT, SHARED_RESERVED = 128, 1024


@dataclass(frozen=True)
class Multiprocessor:
    """Of one compute capability: what it holds. Shared memory in bytes."""

    warps: int
    blocks: int
    shared: int
    registers: int = 65536


MULTIPROCESSORS = {
    80: Multiprocessor(64, 32, 164 * 1024),
    86: Multiprocessor(48, 16, 100 * 1024),
    89: Multiprocessor(48, 24, 100 * 1024),
    90: Multiprocessor(64, 32, 228 * 1024),
    100: Multiprocessor(64, 32, 228 * 1024),
    120: Multiprocessor(48, 24, 100 * 1024),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks (programs) and warps on a multiprocessor at a time; which resource bounds them: "registers", "shared
    memory", "warps" or "blocks"; `share` of the warps that it could hold."""

    blocks: int
    warps: int
    limit: str
    share: float


def occupancy(architecture: int, warps: int, registers: int, shared: int) -> Occupancy:
    """What fits a multiprocessor.

    Args:
        architecture: 80, 90, …
        warps: of a block. registers: of a thread. shared: bytes of a block, static and dynamic.

    Returns:
        0 blocks where one does not fit.
    """
    has = MULTIPROCESSORS[architecture]
    of_a_warp = _up(_up(registers, 8) * WARP, REGISTER_UNIT)
    warps_by_registers = has.registers // PARTS // of_a_warp * PARTS if registers else has.warps
    of_a_block = _up(shared + SHARED_RESERVED, SHARED_UNIT)
    fits = {
        "registers": warps_by_registers // warps,
        "shared memory": has.shared // of_a_block,
        "warps": has.warps // warps,
        "blocks": has.blocks,
    }
    limit = min(fits, key=lambda name: fits[name])
    blocks = fits[limit]
    return Occupancy(blocks, blocks * warps, limit, blocks * warps / has.warps)


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class GPU:
    """processors: multiprocessors. clock: GHz. half, int8: 10^12 operations a second of matrix products, a
    multiplication and an addition being two; half with sums in float32. memory: 10^12 bytes a second."""

    name: str
    architecture: int
    processors: int
    clock: float
    half: float
    int8: float
    memory: float

    @property
    def exponentials(self) -> float:
        """10^12 a second: 16 a clock and multiprocessor on each of these."""
        return 16 * self.processors * self.clock * 1e-3

    @property
    def issue(self) -> float:
        """10^12 instructions of warps a second: one a clock and part of a multiprocessor."""
        return PARTS * self.processors * self.clock * 1e-3


GPUS = (
    GPU("H100 SXM", 90, 132, 1.83, 989.4, 1978.9, 3.35),
    GPU("A100 80GB SXM", 80, 108, 1.41, 312.0, 624.0, 2.039),
    GPU("RTX 4090", 89, 128, 2.52, 165.2, 660.6, 1.008),
)
