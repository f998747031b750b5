"""Matrices whose elements are spread over the registers of a warp.

ISA 9.7.14.5. With g = lane / 4, t = lane % 4 and e elements in a register (2 of 16 bits, 4 of 8), for m16n8k(8e) and
the half of it:

    A [16, k]   register i:  row g + 8 (i % 2), columns  4e (i / 2) + e t + 0 … e-1
    B [k, 8]    register i:  rows 4e i + e t + 0 … e-1, column g
    C, D [16, 8] register i: row g + 8 (i / 2), column 2 t + i % 2
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..machine import Machine
from ..operands import Read, Write
from ..rounding import widen_bf16
from ..types import Array, Mask
from .matrix_access import spread_warps

#: types of A and B -> elements in a register, and how they become float64
ELEMENTS: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "f16": (2, lambda x: x.view(np.float16).astype(np.float64)),
    "bf16": (2, lambda x: widen_bf16(x.view(np.uint16)).astype(np.float64)),
    "s8": (4, lambda x: x.view(np.int8).astype(np.float64)),
    "u8": (4, lambda x: x.view(np.uint8).astype(np.float64)),
}


def fragment_a(registers: Array, e: int) -> Array:
    """[warps, registers, 32, e] to [warps, 16, k]."""
    warps, n = registers.shape[:2]
    return registers.reshape(warps, n // 2, 2, 8, 4, e).transpose(0, 2, 3, 1, 4, 5).reshape(warps, 16, n // 2 * 4 * e)


def fragment_b(registers: Array, e: int) -> Array:
    """[warps, registers, 32, e] to [warps, k, 8]."""
    warps, n = registers.shape[:2]
    return registers.reshape(warps, n, 8, 4, e).transpose(0, 1, 3, 4, 2).reshape(warps, n * 4 * e, 8)


def fragment_c(registers: Array) -> Array:
    """[warps, 4, 32] to [warps, 16, 8]."""
    return registers.reshape(-1, 2, 2, 8, 4).transpose(0, 1, 3, 4, 2).reshape(-1, 16, 8)


def registers_of_d(d: Array) -> Array:
    """[warps, 16, 8] to [warps, 4, 32]."""
    return d.reshape(-1, 2, 8, 4, 2).transpose(0, 1, 4, 2, 3).reshape(-1, 4, 32)


def gather(m: Machine, reads: list[Read], warps: Array) -> Array:
    """[warps, registers, 32] of the operands."""
    rows = np.stack([m.vector(read(m)) for read in reads])
    return np.ascontiguousarray(rows.reshape(len(reads), -1, 32).transpose(1, 0, 2)[warps])


def to_int32(total: Array, satfinite: bool) -> Array:
    """Sums that are exact in float64."""
    if satfinite:
        return np.clip(total, -(2.0**31), 2.0**31 - 1).astype(np.int32)
    return total.astype(np.int64).astype(np.int32)


def scatter(m: Machine, writes: list[Write], d: Array, warps: Array, mask: Mask) -> None:
    """[warps, 16, 8] to the registers of D."""
    values = registers_of_d(d)
    for i, write in enumerate(writes):
        write(m, np.ascontiguousarray(spread_warps(m, warps, values[:, i])), mask)
