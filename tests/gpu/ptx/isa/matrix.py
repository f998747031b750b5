"""mma.sync and mma.sp: products of matrices whose elements are spread over the registers of a warp.

ISA 9.7.14.5. With g = lane / 4, t = lane % 4 and e elements in a register (2 of 16 bits, 4 of 8), for m16n8k(8e) and
the half of it:

    A [16, k]   register i:  row g + 8 (i % 2), columns  4e (i / 2) + e t + 0 … e-1
    B [k, 8]    register i:  rows 4e i + e t + 0 … e-1, column g
    C, D [16, 8] register i: row g + 8 (i / 2), column 2 t + i % 2

Integers: exact in 32 bits, which wrap, or with .satfinite are clamped. Floats: the products and their sum with C are
taken as exact and rounded once to float32; the hardware adds in an order and with a precision that the ISA leaves open
(at least that of float32).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import InvalidOperand
from ..machine import Execute, Machine
from ..operands import Read, Write, items, sink, source
from ..program import Immediate, Instruction, Kernel, Modifiers
from ..registry import opcode
from ..rounding import widen_bf16
from ..types import B32, F32, S32, Array, Mask
from .matrix_access import spread_warps, whole_warps

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


@opcode("mma")
def _mma(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    if mods.flag("sp", "sp::ordered_metadata"):
        return _sparse(ins, mods)
    mods.sequence("sync", "aligned")
    shape = mods.one_of("m16n8k8", "m16n8k16", "m16n8k32")
    mods.sequence("row", "col")
    satfinite = mods.flag("satfinite")
    types = list(mods.left)
    integer = types[:1] == ["s32"]
    a_types = ("s8", "u8") if integer else ("f16", "bf16")
    if len(types) != 4 or types[0] != types[3] or types[0] not in ("s32", "f32"):
        raise ins.unknown("types: expected D and C of .s32 or .f32")
    if types[1] not in a_types or types[2] not in a_types or (satfinite and not integer):
        raise ins.unknown("types of A and B are not modelled")
    if not integer and types[1] != types[2]:
        raise ins.unknown("A and B: expected one type")
    (e, widen_a), (_, widen_b) = ELEMENTS[types[1]], ELEMENTS[types[2]]
    n_b = int(shape[6:]) // (4 * e)
    if n_b not in (1, 2):
        raise ins.unknown(f"shape .{shape} of .{types[1]}")
    d, a, b, c = (items(o) for o in ins.expect(4))
    if (len(d), len(a), len(b), len(c)) != (4, 2 * n_b, n_b, 4):
        raise ins.unknown("numbers of registers")
    result = S32 if integer else F32
    writes = [sink(ins, x, result) for x in d]
    read_a, read_b = [source(ins, x, B32) for x in a], [source(ins, x, B32) for x in b]
    read_c = [source(ins, x, result) for x in c]

    def execute(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask, "mma")
        x = widen_a(gather(m, read_a, warps)).reshape(len(warps), 2 * n_b, 32, e)
        y = widen_b(gather(m, read_b, warps)).reshape(len(warps), n_b, 32, e)
        z = fragment_c(gather(m, read_c, warps)).astype(np.float64)
        total = np.matmul(fragment_a(x, e), fragment_b(y, e)) + z
        scatter(m, writes, to_int32(total, satfinite) if integer else total.astype(np.float32), warps, mask)

    return execute


def dense_a(kept: Array, metadata: Array) -> Array:
    """A [warps, 16, 64] of its kept elements [warps, 16, 32] and the metadata [warps, 32].

    Thread t of a quad has the metadata of row g + 8 (t % 2), columns 32 (t / 2) and the 31 after: four bits for each 4
    columns, two for each of the two elements kept.
    """
    warps = len(kept)
    # [warps, row half, g, column half] -> [warps, 16, 2]
    words = metadata.reshape(warps, 8, 2, 2).transpose(0, 3, 1, 2).reshape(warps, 16, 2)
    pairs = words[..., None] >> (2 * np.arange(16, dtype=np.uint32)) & np.uint32(3)
    positions = pairs.reshape(warps, 16, 16, 2)
    if (positions[..., 0] >= positions[..., 1]).any():
        raise InvalidOperand("metadata: the two positions of four columns are not in ascending order")
    out = np.zeros((warps, 16, 16, 4))
    np.put_along_axis(out, positions.astype(np.int64), kept.reshape(warps, 16, 16, 2), 3)
    return out.reshape(warps, 16, 64)


def _sparse(ins: Instruction, mods: Modifiers) -> Execute:
    """mma.sp of m16n8k64, A with 2 of 4 columns kept; its 32 kept columns lie as those of a dense m16n8k32.

    ISA 9.7.14.6; that its figures of the metadata say what `dense_a` does was checked against CuTe's ELayout and
    against the order in which torch stores it for CUTLASS, not on hardware.
    """
    mods.sequence("sync", "aligned", "m16n8k64", "row", "col")
    satfinite = mods.flag("satfinite")
    types = list(mods.left)
    if len(types) != 4 or (types[0], types[3]) != ("s32", "s32") or not {types[1], types[2]} <= {"s8", "u8"}:
        raise ins.unknown("types: only bytes are modelled")
    *matrices, word, selector = ins.expect(6)
    d, a, b, c = (items(o) for o in matrices)
    if (len(d), len(a), len(b), len(c)) != (4, 4, 4, 4):
        raise ins.unknown("numbers of registers")
    if not isinstance(selector, Immediate) or selector.value:
        raise ins.unknown("the selector: expected 0, for all threads have metadata")
    widen_a, widen_b = ELEMENTS[types[1]][1], ELEMENTS[types[2]][1]
    writes = [sink(ins, x, S32) for x in d]
    read_a, read_b = [source(ins, x, B32) for x in a], [source(ins, x, B32) for x in b]
    read_c, read_word = [source(ins, x, S32) for x in c], source(ins, word, B32)

    def execute(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask, "mma.sp")
        kept = fragment_a(widen_a(gather(m, read_a, warps)).reshape(len(warps), 4, 32, 4), 4)
        x = dense_a(kept, gather(m, [read_word], warps)[:, 0])
        y = fragment_b(widen_b(gather(m, read_b, warps)).reshape(len(warps), 4, 32, 4), 4)
        z = fragment_c(gather(m, read_c, warps)).astype(np.float64)
        scatter(m, writes, to_int32(np.matmul(x, y) + z, satfinite), warps, mask)

    return execute
