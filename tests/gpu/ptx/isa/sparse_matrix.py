"""mma.sp: products whose A has 2 of 4 columns kept.

ISA 9.7.14.6. The kept columns of A lie as those of a dense A of half as many; B, C and D as in `fragments`. Metadata
has four bits for each 4 columns, two for each of the two elements kept, the first one lower. With g and t as there, s
the selector, and rows g and g + 8 called upper and lower:

    bytes, k 64     s 0      thread t: the upper row if t is even, else the lower; columns 32 (t / 2) and the 31 after
    bytes, k 32     s 0, 1   threads 2 s and 2 s + 1: the upper row, the lower; all 32 columns
    16 bits, k 32   s 0, 1   threads 2 s and 2 s + 1: columns 0…15, 16…31; low half the upper row, high half the lower
    16 bits, k 16   s 0…3    thread s: low half the upper row, high half the lower; all 16 columns

That the ISA's figures say this was checked against CuTe's ELayout (bytes, k 64) and against the order in which torch
stores metadata for CUTLASS (k 64 of bytes, k 32 of 16 bits), not on hardware.
"""

from __future__ import annotations

import numpy as np

from ..errors import InvalidOperand
from ..machine import Execute, Machine
from ..operands import items, sink, source
from ..program import Immediate, Instruction, Modifiers
from ..types import B32, F32, S32, Array, Mask
from .fragments import ELEMENTS, fragment_a, fragment_b, fragment_c, gather, scatter, to_int32
from .matrix_access import whole_warps

#: (elements in a register, k) -> threads of a quad that have metadata
_WITH_METADATA = {(4, 64): 4, (4, 32): 2, (2, 32): 2, (2, 16): 1}


def positions(metadata: Array, e: int, k: int, selector: int) -> Array:
    """Columns within each 4, [warps, 16, k / 4, 2], of metadata [warps, 32].

    Raises:
        InvalidOperand: two that are not in ascending order.
    """
    warps, threads = len(metadata), _WITH_METADATA[e, k]
    words = metadata.reshape(warps, 8, 4)[:, :, selector * threads : (selector + 1) * threads]
    if e == 4:
        rows, chunks = words.reshape(warps, 8, threads // 2, 2), 8
    else:
        rows, chunks = words[..., None] >> np.array([0, 16], np.uint32), 4
    rows = rows.transpose(0, 3, 1, 2).reshape(warps, 16, -1, 1)
    fields = rows >> (2 * np.arange(2 * chunks, dtype=np.uint32)) & np.uint32(3)
    found: Array = fields.reshape(warps, 16, k // 4, 2).astype(np.int64)
    if (found[..., 0] >= found[..., 1]).any():
        raise InvalidOperand("metadata: the two positions of four columns are not in ascending order")
    return found


def dense_a(kept: Array, where: Array) -> Array:
    """A [warps, 16, k] of its kept elements [warps, 16, k / 2] and `positions`."""
    warps, _, chunks, _ = where.shape
    out = np.zeros((warps, 16, chunks, 4))
    np.put_along_axis(out, where, kept.reshape(warps, 16, chunks, 2), 3)
    return out.reshape(warps, 16, 4 * chunks)


def decode_sparse(ins: Instruction, mods: Modifiers) -> Execute:
    mods.sequence("sync", "aligned")
    shape = mods.one_of("m16n8k16", "m16n8k32", "m16n8k64")
    mods.sequence("row", "col")
    satfinite = mods.flag("satfinite")
    types, k = tuple(mods.left), int(shape[6:])
    integer = types[:1] == ("s32",)
    known = {("s32", a, b, "s32") for a in ("s8", "u8") for b in ("s8", "u8")} if integer else {
        ("f32", x, x, "f32") for x in ("f16", "bf16")
    }  # fmt: skip
    e = 4 if integer else 2
    if types not in known or (e, k) not in _WITH_METADATA or (satfinite and not integer):
        raise ins.unknown("types, or their shape, are not modelled")
    *matrices, word, selector = ins.expect(6)
    d, a, b, c = (items(o) for o in matrices)
    n_a, n_b = k // (4 * e), k // (4 * e)
    if (len(d), len(a), len(b), len(c)) != (4, n_a, n_b, 4):
        raise ins.unknown("numbers of registers")
    if not isinstance(selector, Immediate) or selector.value not in range(4 // _WITH_METADATA[e, k]):
        raise ins.unknown("the selector: no threads of that number have metadata")
    which, result = selector.value, S32 if integer else F32
    widen_a, widen_b = ELEMENTS[types[1]][1], ELEMENTS[types[2]][1]
    writes = [sink(ins, x, result) for x in d]
    read_a, read_b = [source(ins, x, B32) for x in a], [source(ins, x, B32) for x in b]
    read_c, read_word = [source(ins, x, result) for x in c], source(ins, word, B32)

    def execute(m: Machine, mask: Mask) -> None:
        warps = whole_warps(m, mask, "mma.sp")
        kept = fragment_a(widen_a(gather(m, read_a, warps)).reshape(len(warps), n_a, 32, e), e)
        x = dense_a(kept, positions(gather(m, [read_word], warps)[:, 0], e, k, which))
        y = fragment_b(widen_b(gather(m, read_b, warps)).reshape(len(warps), n_b, 32, e), e)
        total = np.matmul(x, y) + fragment_c(gather(m, read_c, warps)).astype(np.float64)
        scatter(m, writes, to_int32(total, satfinite) if integer else total.astype(np.float32), warps, mask)

    return execute
