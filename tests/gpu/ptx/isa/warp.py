"""What the threads of a warp do together: shfl, vote, redux, activemask, bar.warp.

ISA 9.7.9.6, 9.7.13.9, 9.7.13.10. A member that is not there is an error: on a GPU the others would wait for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ..errors import DivergentWarp
from ..machine import Execute, Machine
from ..operands import Read, sink, source
from ..program import Instruction, Kernel, Modifiers, Operand, Pair, Sink
from ..registry import opcode
from ..types import B32, PRED, U32, Array, Mask
from .common import last_type

_LANES = np.arange(32)
_BITS = _LANES.astype(np.uint32)


def _lanes(m: Machine, values: Array) -> Array:
    """[warps, 32]; lanes beyond the block's end are 0."""
    values = m.vector(values)
    if m.lanes != m.threads:
        values = np.concatenate([values, np.zeros(m.lanes - m.threads, values.dtype)])
    return values.reshape(-1, 32)


def _to_threads(m: Machine, values: Array) -> Array:
    """[warps, 32], or [warps, 1] of what all lanes get, to the block's threads."""
    return np.broadcast_to(values, (m.lanes // 32, 32)).reshape(-1)[: m.threads].copy()


def _members(m: Machine, mask: Mask, read: Read, what: str) -> tuple[NDArray[np.bool_], NDArray[np.bool_] | None]:
    """[warps, 32], which lanes are there; and [warps, 32, 32], whom each of them names, None if all that are there.

    Who is named has to be there, to name the same lanes, and to name itself."""
    there = _lanes(m, np.ones(m.threads, bool) if mask is None else mask)
    asked = _lanes(m, read(m))
    here = (there.astype(np.uint32) << _BITS).sum(1, dtype=np.uint32)
    if not (there & (asked != here[:, None])).any():
        return there, None
    member = (asked[:, :, None] >> _BITS) & np.uint32(1) == 1
    wrong = there & (
        ~member[:, _LANES, _LANES] | (member & (~there[:, None, :] | (asked[:, None, :] != asked[:, :, None]))).any(2)
    )
    if wrong.any():
        warp, lane = (int(i) for i in np.argwhere(wrong)[0])
        raise DivergentWarp(
            f"{what}: thread {warp * 32 + lane} names the lanes {int(asked[warp, lane]):#010x}, there are "
            f"{int(here[warp]):#010x}"
        )
    return there, member


@opcode("shfl")
def _shfl(ins: Instruction, kernel: Kernel) -> Execute:
    destination, value, lane, clamp, members = ins.expect(5)
    mods = Modifiers(ins)
    mods.sequence("sync")
    mode = mods.one_of("up", "down", "bfly", "idx")
    mods.sequence("b32")
    mods.end()
    pair = destination if isinstance(destination, Pair) else Pair(destination, Sink())
    write, write_found = sink(ins, pair.first, B32), sink(ins, pair.second, PRED)
    a, b, c, who = source(ins, value, B32), *(source(ins, o, U32) for o in (lane, clamp, members))

    def execute(m: Machine, mask: Mask) -> None:
        there, member = _members(m, mask, who, "shfl")
        x, by, bounds = _lanes(m, a(m)), _lanes(m, b(m)).astype(np.int64) & 31, _lanes(m, c(m)).astype(np.int64)
        segment = bounds >> 8 & 31
        low, high = _LANES & segment, (_LANES & segment) | (bounds & 31 & ~segment)
        if mode == "up":
            j = _LANES - by
            found = j >= high
        else:
            j = {"down": _LANES + by, "bfly": _LANES ^ by, "idx": low | (by & ~segment)}[mode]
            found = j <= high
        j = np.where(found, j, _LANES)
        if member is None:
            absent = there & ~np.take_along_axis(there, j, 1)
        else:
            absent = there & ~np.take_along_axis(member, j[:, :, None], 2)[:, :, 0]
        if absent.any():
            warp, index = (int(i) for i in np.argwhere(absent)[0])
            raise DivergentWarp(
                f"shfl: thread {warp * 32 + index} reads lane {int(j[warp, index])}, which is no member"
            )
        write(m, np.take_along_axis(x, j, 1).reshape(-1)[: m.threads], mask)
        write_found(m, found.reshape(-1)[: m.threads], mask)

    return execute


@opcode("vote")
def _vote(ins: Instruction, kernel: Kernel) -> Execute:
    destination, value, members = ins.expect(3)
    mods = Modifiers(ins)
    mods.sequence("sync")
    mode = mods.one_of("all", "any", "uni", "ballot")
    mods.sequence("b32" if mode == "ballot" else "pred")
    mods.end()
    write = sink(ins, destination, B32 if mode == "ballot" else PRED)
    a, who = source(ins, value, PRED), source(ins, members, U32)

    def execute(m: Machine, mask: Mask) -> None:
        there, member = _members(m, mask, who, "vote")
        asked = there[:, None, :] if member is None else member
        yes = _lanes(m, a(m))[:, None, :] & asked
        every, some = (yes | ~asked).all(2), yes.any(2)
        if mode == "ballot":
            result = (yes.astype(np.uint32) << _BITS).sum(2, dtype=np.uint32)
        else:
            result = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(m, _to_threads(m, result), mask)

    return execute


_REDUCE: dict[str, tuple[Callable[..., Array], str]] = {
    "add": (np.add.reduce, "su"), "min": (np.minimum.reduce, "su"), "max": (np.maximum.reduce, "su"),
    "and": (np.bitwise_and.reduce, "b"), "or": (np.bitwise_or.reduce, "b"), "xor": (np.bitwise_xor.reduce, "b"),
}  # fmt: skip


@opcode("redux")
def _redux(ins: Instruction, kernel: Kernel) -> Execute:
    destination, value, members = ins.expect(3)
    mods = Modifiers(ins)
    mods.sequence("sync")
    name = mods.one_of(*_REDUCE)
    reduce, kinds = _REDUCE[name]
    type_ = last_type(ins, mods, kinds)
    mods.end()
    if type_.bits != 32:
        raise ins.unknown("type: expected 32 bits")
    write, a, who = sink(ins, destination, type_), source(ins, value, type_), source(ins, members, U32)
    # what changes no result: for lanes that are not there
    info = np.iinfo(type_.dtype)
    neutral = type_.dtype.type({"min": info.max, "max": info.min, "and": info.max}.get(name, 0))

    def execute(m: Machine, mask: Mask) -> None:
        there, member = _members(m, mask, who, "redux")
        asked = there[:, None, :] if member is None else member
        values = np.where(asked, _lanes(m, a(m))[:, None, :], neutral)
        write(m, _to_threads(m, reduce(values, axis=2).astype(type_.dtype)), mask)

    return execute


@opcode("activemask")
def _activemask(ins: Instruction, kernel: Kernel) -> Execute:
    (destination,) = ins.expect(1)
    mods = Modifiers(ins)
    mods.sequence("b32")
    mods.end()
    write = sink(ins, destination, B32)

    def execute(m: Machine, mask: Mask) -> None:
        there = _lanes(m, np.ones(m.threads, bool) if mask is None else mask)
        bits = (there.astype(np.uint32) << _BITS).sum(1, dtype=np.uint32)
        write(m, _to_threads(m, bits[:, None]), mask)

    return execute


def bar_warp(ins: Instruction, operand: Operand) -> Execute:
    """bar.warp.sync: a warp's threads are in step anyway; who is named has to be there."""
    who = source(ins, operand, U32)

    def execute(m: Machine, mask: Mask) -> None:
        _members(m, mask, who, "bar.warp.sync")

    return execute
