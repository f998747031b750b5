"""Bits and predicates: and, or, xor, not, lop3, prmt, setp, selp.

ISA 9.7.5, 9.7.7, 9.7.8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..machine import Execute, Machine
from ..operands import sink, source
from ..program import Immediate, Instruction, Kernel, Modifiers, Pair
from ..registry import opcode
from ..rounding import flush, widen_bf16
from ..types import B32, PRED, Array, Mask
from .common import last_type, pointwise, scalar_type

_BITWISE: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor, "not": np.invert,
}  # fmt: skip


@opcode(*_BITWISE)
def _bitwise(ins: Instruction, kernel: Kernel) -> Execute:
    ins.expect(2 if ins.opcode == "not" else 3)
    mods = Modifiers(ins)
    type_ = scalar_type(ins, mods.last())
    mods.end()
    if type_.kind not in "bp" or 1 < type_.bits < 16:
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    return pointwise(ins, type_, _BITWISE[ins.opcode])


@opcode("lop3")
def _lop3(ins: Instruction, kernel: Kernel) -> Execute:
    *operands, table = ins.expect(5)
    mods = Modifiers(ins)
    mods.sequence("b32")
    mods.end()
    if not isinstance(table, Immediate) or not 0 <= table.value < 256:
        raise ins.unknown("the table: expected an immediate of 8 bits")
    rows = [i for i in range(8) if table.value >> i & 1]

    def compute(a: Array, b: Array, c: Array) -> Array:
        out: Array = np.zeros_like(np.broadcast_arrays(a, b, c)[0])
        for i in rows:
            out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out

    return pointwise(ins, B32, compute, tuple(operands))


@opcode("prmt")
def _prmt(ins: Instruction, kernel: Kernel) -> Execute:
    """Bytes of (a, b) by the four nibbles of the third operand; a nibble's top bit asks for copies of the sign."""
    ins.expect(4)
    mods = Modifiers(ins)
    mods.sequence("b32")
    mods.end()
    # [4] shifts by which a nibble of the selector is found
    shifts = np.arange(0, 16, 4, dtype=np.uint32)

    selector = ins.operands[3]
    if isinstance(selector, Immediate) and not selector.value & 0x8888:
        nibbles = [selector.value >> 4 * i & 7 for i in range(4)]
        write, a, b = sink(ins, ins.operands[0], B32), *(source(ins, o, B32) for o in ins.operands[1:3])

        def fixed(m: Machine, mask: Mask) -> None:
            x, y = a(m), b(m)
            out: Any = np.uint32(0)
            for i, n in enumerate(nibbles):
                byte = (x if n < 4 else y) >> np.uint32(8 * (n & 3)) & np.uint32(255)
                out = out | byte << np.uint32(8 * i)
            write(m, out, mask)

        return fixed

    def compute(a: Array, b: Array, s: Array) -> Array:
        a, b, s = np.broadcast_arrays(a, b, s)
        wide = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        nibble = (np.atleast_1d(s)[:, None] >> shifts) & np.uint32(15)
        byte = np.atleast_1d(wide)[:, None] >> (8 * (nibble & np.uint32(7))).astype(np.uint64) & np.uint64(255)
        byte = np.where(nibble & 8, np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0)), byte)
        return (byte.astype(np.uint32) << (2 * shifts)).sum(1, dtype=np.uint32)

    return pointwise(ins, B32, compute)


_ORDERED: dict[str, Callable[..., Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}
_JOIN: dict[str, Callable[..., Array]] = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(ins: Instruction, name: str, is_float: bool) -> Callable[[Array, Array], Array]:
    if is_float:
        if name == "num":
            return lambda a, b: ~(np.isnan(a) | np.isnan(b))
        if name == "nan":
            return lambda a, b: np.isnan(a) | np.isnan(b)
        if name.endswith("u") and name[:-1] in _ORDERED:
            ordered = _ORDERED[name[:-1]]
            return lambda a, b: ordered(a, b) | np.isnan(a) | np.isnan(b)
        if name == "ne":
            # ordered: numpy's is true for NaN
            return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name not in _ORDERED:
        raise ins.unknown(f"comparison .{name} is not one of this type")
    return _ORDERED[name]


@opcode("setp")
def _setp(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    type_ = scalar_type(ins, mods.last())
    ftz = type_.name == "f32" and mods.flag("ftz")
    if not mods.left:
        raise ins.unknown("comparison: none")
    name = mods.left.pop(0)
    join = mods.any_of(*_JOIN)
    mods.end()
    destination, x, y, *rest = ins.expect(4 if join else 3)
    if type_.kind == "u" and name in _UNSIGNED:
        name = _UNSIGNED[name]
    if type_.bits < 16 or (type_.kind == "b" and name not in ("eq", "ne")):
        raise ins.unknown(f"comparison .{name} of .{type_.name}")
    compare = _comparison(ins, name, type_.is_float)
    a, b = source(ins, x, type_), source(ins, y, type_)
    if type_.kind == "bf":
        inner = compare
        compare = lambda p, q: inner(widen_bf16(p), widen_bf16(q))  # noqa: E731
    if ftz:
        kept = compare
        compare = lambda p, q: kept(flush(p), flush(q))  # noqa: E731
    both = destination if isinstance(destination, Pair) else None
    write = sink(ins, both.first if both else destination, PRED)
    other = sink(ins, both.second, PRED) if both else None
    if join is None and other is None:
        return lambda m, mask: write(m, compare(a(m), b(m)), mask)
    third = source(ins, rest[0], PRED) if rest else None
    combine = _JOIN[join] if join else None

    def execute(m: Machine, mask: Mask) -> None:
        result = compare(a(m), b(m))
        opposite = ~result
        if combine and third:
            c = third(m)
            result, opposite = combine(result, c), combine(opposite, c)
        write(m, result, mask)
        if other:
            other(m, opposite, mask)

    return execute


@opcode("selp")
def _selp(ins: Instruction, kernel: Kernel) -> Execute:
    destination, x, y, condition = ins.expect(4)
    mods = Modifiers(ins)
    type_ = last_type(ins, mods, "subf")
    mods.end()
    if type_.bits < 16:
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    write, a, b = sink(ins, destination, type_), source(ins, x, type_), source(ins, y, type_)
    c = source(ins, condition, PRED)
    return lambda m, mask: write(m, np.where(c(m), a(m), b(m)), mask)
