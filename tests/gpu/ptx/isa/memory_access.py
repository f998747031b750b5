"""ld, st, atom, red, fences.

ISA 9.7.9 (data movement), 9.7.13 (fences, atomics). What a load says about caches is checked for being a known word and
has no effect; acquire and release order blocks (`GlobalMemory`), within a block all is done in one order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..errors import OutOfBounds
from ..machine import Execute, Machine
from ..memory import check_alignment
from ..operands import addresses, items, sink, source
from ..program import Address, Instruction, Kernel, Modifiers, Sink, Symbol
from ..registry import opcode
from ..types import B64, TYPES, Array, Mask
from .common import no_operation, scalar_type

_CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc")
_HINTS = (
    "L1::evict_normal", "L1::evict_unchanged", "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::64B",
    "L2::128B", "L2::256B",
)  # fmt: skip
_ORDER = ("weak", "volatile", "relaxed", "acquire", "release", "acq_rel")
_SCOPES = ("cta", "cluster", "gpu", "sys")


def space_of(ins: Instruction, mods: Modifiers) -> str:
    if mods.flag("shared", "shared::cta"):
        return "shared"
    if mods.flag("global"):
        return "global"
    raise ins.unknown("state space: only global, shared and, of loads, param are modelled")


def _words(mods: Modifiers, load: bool) -> bool:
    """Takes what says how memory is accessed; whether a cache policy follows the operands."""
    order = mods.any_of(*(_ORDER[:4] if load else (*_ORDER[:3], "release")))
    if order not in (None, "weak", "volatile"):
        mods.one_of(*_SCOPES)
    for word in (*_CACHE, *_HINTS):
        mods.flag(word)
    return mods.flag("L2::cache_hint")


def _vector_length(ins: Instruction, mods: Modifiers, operands: int) -> int:
    n = int((mods.any_of("v2", "v4", "v8") or "v1")[1:])
    if n != operands:
        raise ins.unknown(f"a vector of {operands} for .v{n}")
    return n


@opcode("ld")
def _load(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    type_ = scalar_type(ins, mods.last())
    if mods.flag("param"):
        return _load_parameter(ins, mods, type_.name, kernel)
    space = space_of(ins, mods)
    policy = _words(mods, load=True)
    operands = ins.expect(3 if policy else 2)
    targets = items(operands[0])
    n = _vector_length(ins, mods, len(targets))
    mods.end()
    if policy:
        source(ins, operands[2], B64)
    writes = [sink(ins, t, type_, wider=True) for t in targets]
    address = addresses(ins, operands[1], kernel)
    width, raw = type_.bits // 8, type_.raw

    def execute(m: Machine, mask: Mask) -> None:
        threads = m.active(mask)
        at = address(m)[threads]
        if space == "global":
            values = m.memory.load(at, n * width, width, threads, m.block_number)
        else:
            values = m.shared.load(at, n * width, width, threads)
        for i, write in enumerate(writes):
            if mask is None:
                write(m, np.ascontiguousarray(values[:, i]), mask)
            else:
                whole = np.zeros(m.threads, raw)
                whole[threads] = values[:, i]
                write(m, whole, mask)

    return execute


def _load_parameter(ins: Instruction, mods: Modifiers, name: str, kernel: Kernel) -> Execute:
    """Also part of one, at an address that nvcc computes for a structure."""
    destination, place = ins.expect(2)
    targets = items(destination)
    n = _vector_length(ins, mods, len(targets))
    mods.end()
    type_ = TYPES[name]
    size = n * type_.bits // 8
    writes = [sink(ins, t, type_, wider=True) for t in targets]
    if isinstance(place, Address) and isinstance(place.base, Symbol):
        own = next((p for p in kernel.parameters if p.name == place.base.name), None)
        if own is None or not 0 <= place.offset <= own.size - size:
            raise ins.unknown(f"no {size} bytes at {place.offset} of a parameter {place.base.name}")
    address = addresses(ins, place, kernel)

    def execute(m: Machine, mask: Mask) -> None:
        threads = m.active(mask)
        at = address(m)
        check_alignment(at[threads], size, threads, "parameter load")
        bad = (at[threads] < 0) | (at[threads] > m.parameters.size - size)
        if bad.any():
            raise OutOfBounds(f"parameter load: thread {int(threads[bad][0])}, offset {int(at[threads][bad][0])}")
        values = m.parameters[np.where((at < 0) | (at > m.parameters.size - size), 0, at)[:, None] + np.arange(size)]
        columns = values.view(type_.dtype)
        for i, write in enumerate(writes):
            write(m, columns[:, i].copy(), mask)

    return execute


@opcode("st")
def _store(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    type_ = scalar_type(ins, mods.last())
    space = space_of(ins, mods)
    policy = _words(mods, load=False)
    operands = ins.expect(3 if policy else 2)
    values = items(operands[1])
    _vector_length(ins, mods, len(values))
    mods.end()
    if policy:
        source(ins, operands[2], B64)
    reads = [source(ins, v, type_, wider=True) for v in values]
    address = addresses(ins, operands[0], kernel)
    raw = type_.raw

    def execute(m: Machine, mask: Mask) -> None:
        threads = m.active(mask)
        columns = [m.vector(read(m).view(raw))[threads] for read in reads]
        at, rows = address(m)[threads], np.stack(columns, axis=1)
        if space == "global":
            m.memory.store(at, rows, threads, m.block_number)
        else:
            m.shared.store(at, rows, threads)

    return execute


def _plus(old: Array, value: Array) -> Array:
    return old + value


_ATOMIC: dict[str, Callable[..., Array]] = {
    "add": _plus,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, value: value,
}


@opcode("atom", "red")
def _atomic(ins: Instruction, kernel: Kernel) -> Execute:
    """In global memory, one thread after another in the order of their numbers."""
    mods = Modifiers(ins)
    type_ = scalar_type(ins, mods.last())
    order = mods.any_of(*_ORDER[2:])
    scope = mods.one_of(*_SCOPES) if order else mods.any_of(*_SCOPES)
    # within a block, or a cluster, it orders nothing between blocks
    wide = scope in ("gpu", "sys")
    releases, acquires = wide and order in ("release", "acq_rel"), wide and order in ("acquire", "acq_rel")
    if space_of(ins, mods) != "global":
        raise ins.unknown("atomics are modelled in global memory alone")
    name = mods.one_of(*_ATOMIC, "cas")
    mods.end()
    returns = ins.opcode == "atom"
    count = (3 if returns else 2) + (name == "cas")
    operands = list(ins.expect(count))
    if type_.bits < 32 or (name == "cas" and not returns) or (type_.is_float and name != "add"):
        raise ins.unknown(f"this atomic of .{type_.name} is not modelled")
    write = sink(ins, operands.pop(0) if returns else Sink(), type_)
    address = addresses(ins, operands[0], kernel)
    reads = [source(ins, o, type_) for o in operands[1:]]
    combine = _ATOMIC.get(name)
    width, dtype = type_.bits // 8, type_.dtype

    def execute(m: Machine, mask: Mask) -> None:
        at = address(m)
        values = [m.vector(read(m)) for read in reads]
        if releases:
            m.memory.release(m.block_number)
        old = np.zeros(m.threads, dtype)
        for thread in m.active(mask):
            view, index = m.memory.cell(int(at[thread]), width, int(thread))
            typed = view.view(dtype)
            old[thread] = before = typed[index]
            if combine is None:
                typed[index] = values[1][thread] if before == values[0][thread] else before
            else:
                typed[index] = combine(before, values[0][thread])
        if acquires:
            m.memory.acquire()
        write(m, old, mask)

    return execute


@opcode("fence", "membar")
def _fence(ins: Instruction, kernel: Kernel) -> Execute:
    """Before an atomic it releases, after one it acquires: both here."""
    ins.expect(0)
    mods = Modifiers(ins)
    if ins.opcode == "membar":
        scope = mods.one_of("cta", "gl", "sys")
    else:
        if mods.flag("proxy"):
            return _proxy_fence(ins, mods, kernel)
        mods.any_of("sc", "acq_rel")
        scope = mods.one_of(*_SCOPES)
    mods.end()
    if scope in ("cta", "cluster"):
        return no_operation

    def execute(m: Machine, mask: Mask) -> None:
        m.memory.release(m.block_number)
        m.memory.acquire()

    return execute


def _proxy_fence(ins: Instruction, mods: Modifiers, kernel: Kernel) -> Execute:
    """Between plain accesses to shared memory and those of wgmma. By a part of a warp it orders nothing here."""
    if int("".join(c for c in kernel.target if c.isdigit())) < 90:
        raise ins.unknown(f"target {kernel.target}: the asynchronous proxy is of 9.0 and later")
    mods.sequence("async")
    mods.any_of("shared::cta")
    mods.end()

    def execute(m: Machine, mask: Mask) -> None:
        there = np.ones(m.threads, bool) if mask is None else mask
        if m.threads % 32 == 0:
            m.shared.proxy_fence(np.flatnonzero(there.reshape(-1, 32).all(1)))

    return execute


@opcode("createpolicy")
def _policy(ins: Instruction, kernel: Kernel) -> Execute:
    """A hint to the second-level cache, here a number without meaning."""
    operands = ins.expect(1, 2)
    mods = Modifiers(ins)
    mods.sequence("fractional")
    mods.one_of("L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged")
    mods.sequence("b64")
    mods.end()
    write = sink(ins, operands[0], B64)
    if len(operands) == 2:
        source(ins, operands[1], TYPES["f32"])
    return lambda m, mask: write(m, np.zeros(m.threads, np.uint64), mask)
