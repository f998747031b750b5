"""ldmatrix, stmatrix: matrices of 8 rows of 16 bytes between shared memory and the registers of a warp.

ISA 9.7.14.5.15 and 9.7.14.5.16. Thread i gives the address of row i % 8 of matrix i / 8. Thread l holds, of each
matrix, the 16-bit elements 2 (l % 4) and the next of row l / 4; with .trans of column l / 4.
"""

from __future__ import annotations

import numpy as np

from ..errors import DivergentWarp
from ..machine import Execute, Machine
from ..operands import addresses, items, sink, source
from ..program import Instruction, Kernel, Modifiers, Operand
from ..registry import opcode
from ..types import B32, Array, Mask


def whole_warps(m: Machine, mask: Mask, what: str) -> Array:
    """Numbers of the warps that take part, all of whose 32 threads have to."""
    if m.threads % 32:
        raise DivergentWarp(f"{what} in a block of {m.threads} threads: the last warp is not whole")
    if mask is None:
        return np.arange(m.threads // 32)
    lanes = mask.reshape(-1, 32)
    some = lanes.any(1)
    partial = some & ~lanes.all(1)
    if partial.any():
        raise DivergentWarp(f"{what}: warp {int(np.flatnonzero(partial)[0])} is not all there")
    return np.flatnonzero(some)


def spread_warps(m: Machine, warps: Array, values: Array) -> Array:
    """[warps, 32] to all threads of the block; those of other warps get 0, and are masked out."""
    if len(warps) * 32 == m.threads:
        return values.reshape(-1)
    out = np.zeros((m.threads // 32, 32), values.dtype)
    out[warps] = values
    return out.reshape(-1)


def _form(ins: Instruction, registers: Operand) -> tuple[int, bool]:
    """How many matrices, and whether transposed."""
    mods = Modifiers(ins)
    mods.sequence("sync", "aligned", "m8n8")
    n = int(mods.one_of("x1", "x2", "x4")[1:])
    trans = mods.flag("trans")
    if not mods.flag("shared", "shared::cta"):
        raise ins.unknown("state space: only shared is modelled")
    mods.sequence("b16")
    mods.end()
    if len(items(registers)) != n:
        raise ins.unknown(f"{len(items(registers))} registers for .x{n}")
    return n, trans


def _rows(warps: Array, n: int) -> Array:
    """The threads whose addresses are used, [warps * n * 8]."""
    return (warps[:, None] * 32 + np.arange(8 * n)).ravel()


@opcode("ldmatrix")
def _ldmatrix(ins: Instruction, kernel: Kernel) -> Execute:
    destination, place = ins.expect(2)
    n, trans = _form(ins, destination)
    writes = [sink(ins, t, B32) for t in items(destination)]
    address = addresses(ins, place, kernel)

    def execute(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask, "ldmatrix")
        threads = _rows(warps, n)
        loaded = m.shared.load(address(m)[threads], 16, 2, threads).reshape(-1, n, 8, 8)
        if trans:
            loaded = loaded.transpose(0, 1, 3, 2)
        values = np.ascontiguousarray(loaded).view(np.uint32).reshape(-1, n, 32)
        for i, write in enumerate(writes):
            write(m, spread_warps(m, warps, values[:, i]), mask)

    return execute


@opcode("stmatrix")
def _stmatrix(ins: Instruction, kernel: Kernel) -> Execute:
    place, origin = ins.expect(2)
    n, trans = _form(ins, origin)
    reads = [source(ins, r, B32) for r in items(origin)]
    address = addresses(ins, place, kernel)

    def execute(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask, "stmatrix")
        threads = _rows(warps, n)
        rows = np.stack([m.vector(read(m)).reshape(-1, 32)[warps] for read in reads], axis=1)
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, n, 8, 8)
        if trans:
            matrices = matrices.transpose(0, 1, 3, 2)
        m.shared.store(address(m)[threads], np.ascontiguousarray(matrices).reshape(-1, 8), threads)

    return execute
