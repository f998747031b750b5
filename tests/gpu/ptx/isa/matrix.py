"""mma.sync: products of matrices whose elements are spread over the registers of a warp (`fragments`).

ISA 9.7.14.5. Integers: exact in 32 bits, which wrap, or with .satfinite are clamped. Floats: the products and their sum
with C are taken as exact and rounded once to float32; the hardware adds in an order and with a precision that the ISA
leaves open (at least that of float32).
"""

from __future__ import annotations

import numpy as np

from ..machine import Execute, Machine
from ..operands import items, sink, source
from ..program import Instruction, Kernel, Modifiers
from ..registry import opcode
from ..types import B32, F32, S32, Mask
from .fragments import ELEMENTS, fragment_a, fragment_b, fragment_c, gather, scatter, to_int32
from .matrix_access import whole_warps
from .sparse_matrix import decode_sparse


@opcode("mma")
def _mma(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    if mods.flag("sp", "sp::ordered_metadata"):
        return decode_sparse(ins, mods)
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
