"""Operands to functions: `source` reads one as a vector, `sink` writes one, `addresses` computes one.

Widths have to agree with the instruction's type, as in the ISA (chapter 9.2); loads, stores and conversions may use a
wider register and say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .machine import Machine
from .program import Address, Immediate, Instruction, Kernel, Not, Operand, Register, Sink, Special, Symbol, Vector
from .types import RAW, Array, Mask, PtxType

Read = Callable[[Machine], Array]
Write = Callable[[Machine, Array, Mask], None]


def constant(ins: Instruction, operand: Immediate, type_: PtxType) -> Any:
    """The immediate as a numpy scalar of the type; integers have to fit its width, signed or not."""
    if type_.kind == "p":
        return np.bool_(operand.value != 0)
    if operand.decimal and type_.name == "f32":
        return np.float32(np.uint64(operand.value).view(np.float64))
    if operand.float_bits:
        if operand.float_bits != type_.bits:
            raise ins.unknown(f"a float of {operand.float_bits} bits for .{type_.name}")
        return RAW[type_.bits].type(operand.value).view(type_.dtype)
    if not -(1 << type_.bits - 1) <= operand.value < 1 << type_.bits:
        raise ins.unknown(f"{operand.value} does not fit .{type_.name}")
    if type_.is_float:
        raise ins.unknown(f"an integer for .{type_.name}")
    return RAW[type_.bits].type(operand.value & ((1 << type_.bits) - 1)).view(type_.dtype)


def source(ins: Instruction, operand: Operand, type_: PtxType, wider: bool = False) -> Read:
    """Reads a scalar operand in `type_.dtype`. wider: a register of more bits is cut."""
    dtype = type_.dtype
    if isinstance(operand, Register):
        index, held = operand.index, operand.type
        if type_.kind == "p" or held.kind == "p":
            if type_.kind != held.kind:
                raise ins.unknown(f"{operand.name} is .{held.name}, expected .{type_.name}")
            return lambda m: m.read_written(index)
        if held.bits == type_.bits:
            return lambda m: m.read(index).view(dtype)
        if wider and held.bits > type_.bits:
            raw = type_.raw
            return lambda m: m.read(index).astype(raw).view(dtype)
        raise ins.unknown(f"{operand.name} has {held.bits} bits, expected {type_.bits}")
    if isinstance(operand, Immediate):
        value = constant(ins, operand, type_)
        return lambda m: value
    if isinstance(operand, Special):
        if type_.bits != 32 or not type_.is_integer:
            raise ins.unknown(f"%{operand.name} is a 32-bit integer, expected .{type_.name}")
        name = operand.name
        return lambda m: m.special[name].view(dtype)
    if isinstance(operand, Not) and type_.kind == "p" and operand.operand.type.kind == "p":
        index = operand.operand.index
        return lambda m: ~m.read_written(index)
    raise ins.unknown(f"operand {operand!r}: expected a scalar of .{type_.name}")


def variable(ins: Instruction, symbol: Symbol, kernel: Kernel) -> int:
    """Its address in shared memory, or that of a parameter among the parameters."""
    if symbol.name in kernel.shared:
        return kernel.shared[symbol.name]
    for parameter in kernel.parameters:
        if parameter.name == symbol.name:
            return parameter.offset
    raise ins.unknown(f"{symbol.name} is no shared variable and no parameter")


def raw_bits(value: Array) -> Array:
    """A vector as registers hold it."""
    return value if value.dtype == bool else value.view(RAW[8 * value.itemsize])


def sink(ins: Instruction, operand: Operand, type_: PtxType, wider: bool = False) -> Write:
    """Writes a scalar operand. wider: a register of more bits gets the value extended, by sign if the type has one."""
    if isinstance(operand, Sink):
        return lambda m, value, mask: None
    if not isinstance(operand, Register):
        raise ins.unknown(f"operand {operand!r}: expected a register")
    index, held = operand.index, operand.type
    if type_.kind == "p" or held.kind == "p":
        if type_.kind != held.kind:
            raise ins.unknown(f"{operand.name} is .{held.name}, expected .{type_.name}")
        return lambda m, value, mask: m.write(index, value, mask)
    if held.bits == type_.bits:
        raw = type_.raw
        return lambda m, value, mask: m.write(index, value.view(raw), mask)
    if wider and held.bits > type_.bits:
        dtype, extended = type_.dtype, np.dtype(f"{'i' if type_.kind == 's' else 'u'}{held.bits // 8}")
        raw = held.raw
        return lambda m, value, mask: m.write(index, value.view(dtype).astype(extended).view(raw), mask)
    raise ins.unknown(f"{operand.name} has {held.bits} bits, expected {type_.bits}")


def items(operand: Operand) -> tuple[Operand, ...]:
    """Of a vector, or the operand alone."""
    return operand.items if isinstance(operand, Vector) else (operand,)


def addresses(ins: Instruction, operand: Operand, kernel: Kernel) -> Callable[[Machine], NDArray[np.int64]]:
    """Of all threads, also of those that do not take part."""
    if not isinstance(operand, Address):
        raise ins.unknown(f"operand {operand!r}: expected an address")
    base, offset = operand.base, operand.offset
    if isinstance(base, Register):
        if base.type.kind == "p" or base.type.bits < 32:
            raise ins.unknown(f"{base.name} holds no address")
        index = base.index
        return lambda m: m.read_written(index).astype(np.int64) + offset
    fixed = (variable(ins, base, kernel) if isinstance(base, Symbol) else base.value) + offset
    return lambda m: np.full(m.threads, fixed, np.int64)


def guard(ins: Instruction) -> Callable[[Machine], NDArray[np.bool_]] | None:
    if ins.guard is None:
        return None
    index = ins.guard.index
    if ins.guard_negated:
        return lambda m: ~m.read_written(index)
    return lambda m: m.read_written(index)
