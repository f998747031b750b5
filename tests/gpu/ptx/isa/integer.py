"""Integers only: mad, bfe, bfi, dp4a, popc, clz, brev, shifts.

ISA 9.7.1 and 9.7.8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..machine import Execute
from ..operands import sink, source
from ..program import Instruction, Kernel, Modifiers
from ..registry import opcode
from ..types import B32, TYPES, U32, Array
from .arithmetic import product
from .common import last_type, pointwise


@opcode("mad")
def _mad(ins: Instruction, kernel: Kernel) -> Execute:
    destination, x, y, z = ins.expect(4)
    mods = Modifiers(ins)
    type_ = last_type(ins, mods, "su")
    part = mods.one_of("lo", "hi", "wide")
    mods.end()
    if type_.bits < 16 or (part == "wide" and type_.bits == 64):
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    result, multiply = product(type_, part)
    write, a, b, c = sink(ins, destination, result), *(source(ins, o, type_) for o in (x, y)), source(ins, z, result)
    return lambda m, mask: write(m, multiply(a(m), b(m)) + c(m), mask)


def _field(pos: Array, length: Array, bits: int) -> tuple[Array, Array]:
    """Position, and a mask of `length` ones, as uint64; both operands are taken modulo 256."""
    pos, length = (np.asarray(v & np.uint32(255)).astype(np.uint64) for v in (pos, length))
    ones = np.where(length >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(length, 63)) - np.uint64(1))
    return pos, np.where(length >= bits, np.uint64((1 << bits) - 1), ones)


@opcode("bfe")
def _bfe(ins: Instruction, kernel: Kernel) -> Execute:
    destination, value, position, length = ins.expect(4)
    mods = Modifiers(ins)
    type_ = last_type(ins, mods, "su")
    mods.end()
    if type_.bits < 32:
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    write, a = sink(ins, destination, type_), source(ins, value, type_)
    pos, count = source(ins, position, U32), source(ins, length, U32)
    signed, top = type_.kind == "s", np.uint64(type_.bits - 1)

    def extract(x: Array, p: Array, n: Array) -> Array:
        wide = np.asarray(x.view(type_.raw)).astype(np.uint64)
        at, _ = _field(p, n, type_.bits)
        # of a field that reaches beyond the top bit there is only what is below
        there = np.minimum(
            np.asarray(n & np.uint32(255)).astype(np.int64), np.maximum(type_.bits - at.astype(np.int64), 0)
        )
        _, ones = _field(p, there.astype(np.uint32), type_.bits)
        out = np.where(at > top, np.uint64(0), wide >> np.minimum(at, top)) & ones
        if signed:
            last = np.minimum(at + np.asarray(n & np.uint32(255)).astype(np.uint64) - np.uint64(1), top)
            negative = ((wide >> last) & np.uint64(1) == 1) & (n & np.uint32(255) != 0)
            out = np.where(negative, out | ~ones, out)
        return out.astype(type_.raw).view(type_.dtype)

    return lambda m, mask: write(m, extract(a(m), pos(m), count(m)), mask)


@opcode("bfi")
def _bfi(ins: Instruction, kernel: Kernel) -> Execute:
    destination, inserted, base, position, length = ins.expect(5)
    mods = Modifiers(ins)
    type_ = last_type(ins, mods, "b")
    mods.end()
    if type_.bits < 32:
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    write, a, b = sink(ins, destination, type_), source(ins, inserted, type_), source(ins, base, type_)
    pos, count = source(ins, position, U32), source(ins, length, U32)

    def insert(x: Array, y: Array, p: Array, n: Array) -> Array:
        at, ones = _field(p, n, type_.bits)
        x, y = (np.asarray(v).astype(np.uint64) for v in (x, y))
        shift = np.minimum(at, np.uint64(63))
        at_field = np.where(at >= type_.bits, np.uint64(0), ones << shift)
        return ((y & ~at_field) | ((x << shift) & at_field)).astype(type_.dtype)

    return lambda m, mask: write(m, insert(a(m), b(m), pos(m), count(m)), mask)


@opcode("dp4a")
def _dp4a(ins: Instruction, kernel: Kernel) -> Execute:
    destination, x, y, z = ins.expect(4)
    mods = Modifiers(ins)
    b_type, a_type = last_type(ins, mods, "su"), last_type(ins, mods, "su")
    mods.end()
    if (a_type.bits, b_type.bits) != (32, 32):
        raise ins.unknown("types: expected 32 bits")
    result = TYPES["s32" if "s" in (a_type.kind, b_type.kind) else "u32"]
    write, a, b = sink(ins, destination, result), source(ins, x, a_type), source(ins, y, b_type)
    c = source(ins, z, result)

    def parts(v: Array, kind: str) -> Array:
        raw = np.atleast_1d(v).view(np.int8 if kind == "s" else np.uint8).reshape(-1, 4)
        return raw.astype(result.dtype)

    return lambda m, mask: write(
        m, (parts(a(m), a_type.kind) * parts(b(m), b_type.kind)).sum(1, dtype=result.dtype) + c(m), mask
    )


def _bits(x: Array, width: int) -> Array:
    """[n, width], lowest bit first."""
    raw = np.ascontiguousarray(np.atleast_1d(x))
    return np.unpackbits(raw.view(np.uint8).reshape(raw.size, -1), axis=1, bitorder="little")[:, :width]


@opcode("popc", "clz")
def _count(ins: Instruction, kernel: Kernel) -> Execute:
    destination, value = ins.expect(2)
    mods = Modifiers(ins)
    type_ = last_type(ins, mods, "b")
    mods.end()
    if type_.bits < 32:
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    write, a = sink(ins, destination, U32), source(ins, value, type_)
    count: Callable[[Array], Array] = (
        (lambda x: _bits(x, type_.bits).sum(1))
        if ins.opcode == "popc"
        else (lambda x: (np.cumsum(_bits(x, type_.bits)[:, ::-1], axis=1) == 0).sum(1))
    )
    return lambda m, mask: write(m, count(a(m)).astype(np.uint32), mask)


@opcode("brev")
def _reverse(ins: Instruction, kernel: Kernel) -> Execute:
    ins.expect(2)
    mods = Modifiers(ins)
    type_ = last_type(ins, mods, "b")
    mods.end()
    return pointwise(
        ins,
        type_,
        lambda x: np.packbits(_bits(x, type_.bits)[:, ::-1], axis=1, bitorder="little").view(type_.raw)[:, 0],
    )


@opcode("shl", "shr")
def _shift(ins: Instruction, kernel: Kernel) -> Execute:
    """The amount is unsigned and 32 bits; from the width on all is shifted out."""
    destination, value, amount = ins.expect(3)
    mods = Modifiers(ins)
    type_ = last_type(ins, mods, "b" if ins.opcode == "shl" else "sub")
    mods.end()
    if type_.bits < 16:
        raise ins.unknown(f"type .{type_.name} is not one of this instruction")
    write, a, by = sink(ins, destination, type_), source(ins, value, type_), source(ins, amount, U32)
    left, most = ins.opcode == "shl", np.uint32(type_.bits - 1)
    signed = type_.kind == "s"

    def shift(x: Array, n: Array) -> Array:
        within = np.minimum(n, most).astype(type_.dtype)
        out = x << within if left else x >> within
        if signed:
            return out
        return np.where(n > most, type_.dtype.type(0), out) if np.any(n > most) else out

    return lambda m, mask: write(m, shift(a(m), by(m)), mask)


@opcode("shf")
def _funnel(ins: Instruction, kernel: Kernel) -> Execute:
    """shf.l: the upper half of (high, low) << n; shf.r: the lower half of (high, low) >> n."""
    destination, low, high, amount = ins.expect(4)
    mods = Modifiers(ins)
    left = mods.one_of("l", "r") == "l"
    wrap = mods.one_of("wrap", "clamp") == "wrap"
    mods.sequence("b32")
    mods.end()
    write, a, b, by = sink(ins, destination, B32), *(source(ins, o, B32) for o in (low, high)), source(ins, amount, U32)

    def shift(lo: Array, hi: Array, n: Array) -> Array:
        n = np.asarray(n & np.uint32(31) if wrap else np.minimum(n, np.uint32(32))).astype(np.uint64)
        both = np.asarray(hi).astype(np.uint64) << np.uint64(32) | np.asarray(lo).astype(np.uint64)
        return ((both << n) >> np.uint64(32) if left else both >> n).astype(np.uint32)

    return lambda m, mask: write(m, shift(a(m), b(m), by(m)), mask)
