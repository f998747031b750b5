"""add, sub, mul, div, min, max, neg, abs: on integers, float32, float64, 16-bit floats and pairs of those.

ISA 9.7.1 (integers), 9.7.3 (float32 and 64), 9.7.4 (16 bits).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import InvalidOperand
from ..machine import Execute, Machine
from ..operands import sink, source
from ..program import Instruction, Kernel, Modifiers
from ..registry import opcode
from ..rounding import maximum, minimum
from ..types import TYPES, Array, Mask, PtxType
from .common import PACKED, both_halves, flushing, pointwise, saturating, scalar_type, widened

_EXACT: dict[str, Callable[..., Array]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def _float(ins: Instruction, mods: Modifiers, name: str, compute: Callable[..., Array], rounds: bool) -> Execute:
    """The float forms of an instruction whose type `name` is taken already."""
    if rounds:
        mods.flag("rn")
    if name in PACKED or name in ("f16", "bf16"):
        element = PACKED.get(name) or TYPES[name]
        ftz = name == "f32x2" and mods.flag("ftz")
        mods.end()
        compute = flushing(widened(element, compute), ftz)
        return both_halves(ins, element, compute) if name in PACKED else pointwise(ins, element, compute)
    if name == "f32":
        ftz, sat = mods.flag("ftz"), rounds and mods.flag("sat")
        mods.end()
        return pointwise(ins, TYPES["f32"], saturating(flushing(compute, ftz), sat))
    mods.end()
    if name != "f64":
        raise ins.unknown(f"type .{name} is not modelled here")
    return pointwise(ins, TYPES["f64"], compute)


def _is_float(name: str) -> bool:
    return name in PACKED or name[0] == "f" or name.startswith("bf")


@opcode("add", "sub")
def _add(ins: Instruction, kernel: Kernel) -> Execute:
    ins.expect(3)
    mods = Modifiers(ins)
    name = mods.last()
    if _is_float(name):
        return _float(ins, mods, name, _EXACT[ins.opcode], rounds=True)
    mods.end()
    type_ = scalar_type(ins, name)
    if type_.kind not in "su" or type_.bits < 16:
        raise ins.unknown(f"type .{name} is not one of this instruction")
    return pointwise(ins, type_, _EXACT[ins.opcode])


def product(type_: PtxType, part: str) -> tuple[PtxType, Callable[[Array, Array], Array]]:
    """Of integers: its type and the function, for `part` lo, hi or wide."""
    if part == "lo":
        return type_, np.multiply
    if part == "wide":
        wide = TYPES[f"{type_.kind}{2 * type_.bits}"]
        return wide, lambda a, b: a.astype(wide.dtype) * b.astype(wide.dtype)
    if type_.bits == 64:
        return type_, _high_64
    wide = TYPES[f"{type_.kind}{2 * type_.bits}"]
    shift = wide.dtype.type(type_.bits)
    return type_, lambda a, b: ((a.astype(wide.dtype) * b.astype(wide.dtype)) >> shift).astype(type_.dtype)


def _high_64(a: Array, b: Array) -> Array:
    """By Python's integers: rare, and no numpy type is wide enough."""
    a, b = np.broadcast_arrays(a, b)
    high = [int(x) * int(y) >> 64 for x, y in zip(a, b, strict=True)]
    return np.array([h & (1 << 64) - 1 for h in high], np.uint64).view(a.dtype)


@opcode("mul")
def _mul(ins: Instruction, kernel: Kernel) -> Execute:
    destination, *factors = ins.expect(3)
    mods = Modifiers(ins)
    name = mods.last()
    if _is_float(name):
        return _float(ins, mods, name, np.multiply, rounds=True)
    type_ = scalar_type(ins, name)
    part = mods.one_of("lo", "hi", "wide")
    mods.end()
    if type_.kind not in "su" or type_.bits < 16 or (part == "wide" and type_.bits == 64):
        raise ins.unknown(f"type .{name} is not one of this instruction")
    result, compute = product(type_, part)
    write = sink(ins, destination, result)
    a, b = (source(ins, x, type_) for x in factors)
    return lambda m, mask: write(m, compute(a(m), b(m)), mask)


@opcode("div", "rem")
def _divide(ins: Instruction, kernel: Kernel) -> Execute:
    """div.full and div.approx are taken as rounded correctly; the hardware's may be 2 units off."""
    destination, dividend, divisor = ins.expect(3)
    mods = Modifiers(ins)
    name = mods.last()
    if name == "f32" and ins.opcode == "div":
        mods.one_of("rn", "full", "approx")
        ftz = mods.flag("ftz")
        mods.end()
        return pointwise(ins, TYPES["f32"], flushing(np.divide, ftz))
    mods.end()
    type_ = scalar_type(ins, name)
    if type_.kind not in "su" or type_.bits < 16:
        raise ins.unknown(f"type .{name} is not one of this instruction")
    write = sink(ins, destination, type_)
    read_a, read_b = source(ins, dividend, type_), source(ins, divisor, type_)
    remainder = ins.opcode == "rem"

    def execute(m: Machine, mask: Mask) -> None:
        a, b = (m.vector(x) for x in (read_a(m), read_b(m)))
        zero = b == 0
        if zero[m.active(mask)].any():
            raise InvalidOperand("division by zero")
        b = np.where(zero, 1, b).astype(type_.dtype)
        # numpy rounds down, PTX towards zero
        rest = np.fmod(a, b)
        write(m, rest if remainder else (a - rest) // b, mask)

    return execute


@opcode("min", "max")
def _extreme(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    name = mods.last()
    if not _is_float(name):
        ins.expect(3)
        mods.end()
        type_ = scalar_type(ins, name)
        if type_.kind not in "su" or type_.bits < 16:
            raise ins.unknown(f"type .{name} is not one of this instruction")
        return pointwise(ins, type_, np.minimum if ins.opcode == "min" else np.maximum)
    # of three: sm_100 and later, float32 alone
    ins.expect(3, 4) if name == "f32" else ins.expect(3)
    nan = mods.flag("NaN")
    two = minimum if ins.opcode == "min" else maximum

    def compute(a: Array, b: Array, *c: Array) -> Array:
        first = two(a, b, nan)
        return two(first, c[0], nan) if c else first

    return _float(ins, mods, name, compute, rounds=False)


@opcode("neg", "abs")
def _sign(ins: Instruction, kernel: Kernel) -> Execute:
    ins.expect(2)
    mods = Modifiers(ins)
    name = mods.last()
    if _is_float(name) and name != "f32x2":
        element = PACKED.get(name) or scalar_type(ins, name)
        ftz = name == "f32" and mods.flag("ftz")
        mods.end()
        sign = TYPES[f"b{element.bits}"].dtype.type(1 << element.bits - 1)

        def flip(x: Array) -> Array:
            bits = x.view(sign.dtype)
            return (bits ^ sign if ins.opcode == "neg" else bits & ~sign).view(element.dtype)

        if name in PACKED:
            return both_halves(ins, element, flip)
        return pointwise(ins, element, flushing(flip, ftz))
    mods.end()
    type_ = scalar_type(ins, name)
    if type_.kind != "s" or type_.bits < 16:
        raise ins.unknown(f"type .{name} is not one of this instruction")
    return pointwise(ins, type_, np.negative if ins.opcode == "neg" else np.abs)
