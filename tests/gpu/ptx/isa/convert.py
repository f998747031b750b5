"""mov, cvta, cvt: copies, packing, conversions.

ISA 9.7.9.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..machine import Execute, Machine
from ..operands import raw_bits, sink, source, variable
from ..program import Instruction, Kernel, Modifiers, Symbol, Vector
from ..registry import opcode
from ..rounding import flush, narrow_bf16, narrow_bf16_from_f64, to_integer, widen_bf16
from ..types import F32, TYPES, Array, Mask, PtxType
from .common import saturating, scalar_type


@opcode("mov")
def _mov(ins: Instruction, kernel: Kernel) -> Execute:
    destination, origin = ins.expect(2)
    mods = Modifiers(ins)
    type_ = scalar_type(ins, mods.last())
    mods.end()
    if isinstance(destination, Vector):
        return _unpack(ins, destination, type_)
    if isinstance(origin, Vector):
        return _pack(ins, origin, type_)
    write = sink(ins, destination, type_)
    if isinstance(origin, Symbol):
        address = type_.dtype.type(variable(ins, origin, kernel))
        return lambda m, mask: write(m, address, mask)
    read = source(ins, origin, type_)
    return lambda m, mask: write(m, read(m), mask)


def _part(ins: Instruction, vector: Vector, type_: PtxType) -> PtxType:
    bits = type_.bits // len(vector.items)
    if bits * len(vector.items) != type_.bits or bits not in (8, 16, 32) or len(vector.items) not in (2, 4):
        raise ins.unknown(f"{len(vector.items)} parts of .{type_.name}")
    return TYPES[f"b{bits}"]


def _unpack(ins: Instruction, parts: Vector, type_: PtxType) -> Execute:
    part = _part(ins, parts, type_)
    writes = [sink(ins, p, part) for p in parts.items]
    read = source(ins, ins.operands[1], type_)

    def execute(m: Machine, mask: Mask) -> None:
        columns = np.ascontiguousarray(np.atleast_1d(read(m))).view(part.dtype).reshape(-1, len(writes))
        for i, write in enumerate(writes):
            write(m, m.vector(columns[:, i].copy() if len(columns) > 1 else columns[0, i]), mask)

    return execute


def _pack(ins: Instruction, parts: Vector, type_: PtxType) -> Execute:
    part = _part(ins, parts, type_)
    reads = [source(ins, p, part) for p in parts.items]
    write = sink(ins, ins.operands[0], type_)
    raw, shift = type_.raw, part.bits

    def execute(m: Machine, mask: Mask) -> None:
        out: Array = reads[0](m).astype(raw)
        for i, read in enumerate(reads[1:], 1):
            out = out | read(m).astype(raw) << raw.type(i * shift)
        write(m, out, mask)

    return execute


@opcode("cvta")
def _cvta(ins: Instruction, kernel: Kernel) -> Execute:
    """Generic addresses of global memory are its own; those of shared memory are not modelled, but for being turned
    into what they were."""
    destination, origin = ins.expect(2)
    mods = Modifiers(ins)
    to = mods.flag("to")
    mods.one_of("global", "shared")
    type_ = scalar_type(ins, mods.last())
    mods.end()
    if type_.name not in ("u64", "u32"):
        raise ins.unknown("type: expected .u64 or .u32")
    write = sink(ins, destination, type_)
    if isinstance(origin, Symbol):
        if to:
            raise ins.unknown("a variable is no generic address")
        address = type_.dtype.type(variable(ins, origin, kernel))
        return lambda m, mask: write(m, address, mask)
    read = source(ins, origin, type_)
    return lambda m, mask: write(m, read(m), mask)


_TO_INTEGER = ("rni", "rzi", "rmi", "rpi")


@opcode("cvt")
def _cvt(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    if mods.flag("pack"):
        return _cvt_pack(ins, mods)
    origin_name, destination_name = mods.last(), mods.last()
    if destination_name in ("f16x2", "bf16x2"):
        return _cvt_pair(ins, mods, origin_name, destination_name)
    destination, origin = ins.expect(2)
    from_, to = scalar_type(ins, origin_name), scalar_type(ins, destination_name)
    if "p" in (from_.kind, to.kind) or "b" in (from_.kind, to.kind):
        raise ins.unknown("a conversion of bits or predicates")
    convert = _conversion(ins, mods, from_, to)
    mods.end()
    write, read = sink(ins, destination, to, wider=to.is_integer), source(ins, origin, from_, wider=True)
    return lambda m, mask: write(m, convert(read(m)), mask)


def _conversion(ins: Instruction, mods: Modifiers, from_: PtxType, to: PtxType) -> Callable[[Array], Array]:
    dtype = to.dtype
    if from_.is_integer and to.is_integer:
        if not mods.flag("sat"):
            return lambda x: x.astype(dtype)
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        # a bound that the origin cannot reach is none
        own = np.iinfo(from_.dtype)
        return lambda x: np.clip(x, max(low, own.min), min(high, own.max)).astype(dtype)
    if from_.is_integer:
        mods.sequence("rn")
        if to.bits == 16 and from_.bits <= 32:
            # float64 holds these integers exactly, so that they are rounded once
            if to.kind == "bf":
                return lambda x: narrow_bf16_from_f64(x.astype(np.float64))
            return lambda x: x.astype(np.float64).astype(np.float16)
        if to.bits != 32:
            raise ins.unknown(f".{to.name} from .{from_.name} is not modelled")
        # 64-bit integers to float64 would round twice; numpy's int64 to float32 rounds once
        return lambda x: x.astype(dtype)
    widen: Callable[[Array], Array] = widen_bf16 if from_.kind == "bf" else lambda x: x
    if to.is_integer:
        rounding = mods.one_of(*_TO_INTEGER)
        ftz = from_.bits == 32 and mods.flag("ftz")
        mods.flag("sat")  # always so for integers
        return lambda x: to_integer(flush(x) if ftz else widen(x), rounding, dtype)
    if from_ == to and mods.left == ["sat"] and to.name == "f32":
        mods.flag("sat")
        return saturating(lambda x: x, True)
    if from_ == to:
        rounding = mods.one_of(*_TO_INTEGER)
        ftz = from_.bits == 32 and mods.flag("ftz")
        if from_.kind == "bf":
            raise ins.unknown("rounding of bfloat16 is not modelled")
        to_whole = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[rounding]
        return lambda x: to_whole(flush(x) if ftz else x)
    if to.bits > from_.bits:
        if from_.bits == 32:
            return lambda x: x.astype(dtype)
        if to.bits == 32:
            mods.flag("ftz")  # no 16-bit float is subnormal in 32
            return lambda x: widen(x).astype(dtype)
        raise ins.unknown(f".{to.name} from .{from_.name} is not modelled")
    mods.sequence("rn")
    if from_.bits == 64 and to.bits == 32:
        return lambda x: x.astype(dtype)
    if from_.bits != 32:
        raise ins.unknown(f".{to.name} from .{from_.name} is not modelled")
    return narrow_bf16 if to.kind == "bf" else lambda x: x.astype(dtype)


def _cvt_pair(ins: Instruction, mods: Modifiers, origin: str, destination: str) -> Execute:
    """Two float32 to a pair of 16-bit floats; the first operand becomes the upper half."""
    result, upper, lower = ins.expect(3)
    mods.sequence("rn")
    relu = mods.flag("relu")
    mods.end()
    if origin != "f32":
        raise ins.unknown(f".{destination} from .{origin} is not modelled")
    narrow: Callable[[Array], Array] = (
        narrow_bf16 if destination == "bf16x2" else lambda x: x.astype(np.float16).view(np.uint16)
    )
    write, a, b = sink(ins, result, TYPES["b32"]), source(ins, upper, F32), source(ins, lower, F32)
    zero, half = np.float32(0), np.uint32(16)

    def execute(m: Machine, mask: Mask) -> None:
        high, low = a(m), b(m)
        if relu:
            high, low = (np.where(x <= 0, zero, x) for x in (high, low))
        write(m, narrow(high).astype(np.uint32) << half | narrow(low).astype(np.uint32), mask)

    return execute


def _cvt_pack(ins: Instruction, mods: Modifiers) -> Execute:
    """cvt.pack.sat.{u8,s8,u16,s16}.s32[.b32]: d = (sat(a), sat(b)) in the low bits, above them the low bits of c."""
    names = list(mods.left)
    mods.sequence("sat")
    element = scalar_type(ins, names[1] if len(names) > 1 else "")
    mods.sequence(element.name, "s32")
    with_third = mods.flag("b32")
    mods.end()
    if element.name not in ("u8", "s8", "u16", "s16") or (element.bits == 16) == with_third:
        raise ins.unknown("cvt.pack: these types are not modelled")
    result, *values = ins.expect(4 if with_third else 3)
    write = sink(ins, result, TYPES["b32"])
    a, b = (source(ins, v, TYPES["s32"]) for v in values[:2])
    c = source(ins, values[2], TYPES["b32"]) if with_third else None
    info, bits = np.iinfo(element.dtype), np.uint32(element.bits)

    def part(x: Array) -> Array:
        return np.clip(x, info.min, info.max).astype(element.dtype).view(element.raw).astype(np.uint32)

    def execute(m: Machine, mask: Mask) -> None:
        out = part(a(m)) << bits | part(b(m))
        if c is not None:
            out = out | c(m) << np.uint32(16)
        write(m, raw_bits(out), mask)

    return execute
