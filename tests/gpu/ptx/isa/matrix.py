"""mma.sync: products of matrices whose elements are spread over the registers of a warp.

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

from ..machine import Execute, Machine
from ..operands import items, sink, source
from ..program import Instruction, Kernel, Modifiers
from ..registry import opcode
from ..rounding import widen_bf16
from ..types import B32, F32, S32, Array, Mask
from .matrix_access import spread_warps, whole_warps

#: types of A and B -> elements in a register, and how they become float64
_ELEMENTS: dict[str, tuple[int, Callable[[Array], Array]]] = {
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


@opcode("mma")
def _mma(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    if mods.flag("sp", "sp::ordered_metadata"):
        raise ins.unknown("mma.sp is not modelled")
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
    (e, widen_a), (_, widen_b) = _ELEMENTS[types[1]], _ELEMENTS[types[2]]
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

    def gather(m: Machine, reads: list[Callable[[Machine], Array]], warps: Array) -> Array:
        """[warps, registers, 32]"""
        rows = np.stack([m.vector(read(m)) for read in reads])
        return rows.reshape(len(reads), -1, 32).transpose(1, 0, 2)[warps]

    def execute(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask, "mma")
        x = widen_a(np.ascontiguousarray(gather(m, read_a, warps))).reshape(len(warps), 2 * n_b, 32, e)
        y = widen_b(np.ascontiguousarray(gather(m, read_b, warps))).reshape(len(warps), n_b, 32, e)
        z = fragment_c(gather(m, read_c, warps)).astype(np.float64)
        total = np.matmul(fragment_a(x, e), fragment_b(y, e)) + z
        if not integer:
            out = total.astype(np.float32)
        elif satfinite:
            out = np.clip(total, -(2.0**31), 2.0**31 - 1).astype(np.int32)
        else:
            out = total.astype(np.int64).astype(np.int32)
        values = registers_of_d(out)
        for i, write in enumerate(writes):
            write(m, np.ascontiguousarray(spread_warps(m, warps, values[:, i])), mask)

    return execute
