"""cp.async: copies from global to shared memory that arrive when they are waited for, and not before.

ISA 9.7.9.25. Until then the destination is neither old nor new, and any access to it is an error. The wait makes the
bytes visible to the warp that issued the copy; other warps need a barrier, which the race check of shared memory asks
for. Bytes that a copy skips (a size of less than cp-size, ignore-src) are zeros.
"""

from __future__ import annotations

import numpy as np

from ..errors import InvalidOperand
from ..machine import Copy, Execute, Machine
from ..operands import addresses, source
from ..program import Immediate, Instruction, Kernel, Modifiers, Register
from ..registry import opcode
from ..types import B64, PRED, U32, Mask


@opcode("cp")
def _copy(ins: Instruction, kernel: Kernel) -> Execute:
    mods = Modifiers(ins)
    mods.sequence("async")
    if mods.flag("commit_group"):
        ins.expect(0)
        mods.end()
        return _commit
    if mods.flag("wait_all"):
        ins.expect(0)
        mods.end()
        return lambda m, mask: m.wait_copies(None, mask)
    if mods.flag("wait_group"):
        (keep,) = ins.expect(1)
        mods.end()
        if not isinstance(keep, Immediate) or keep.value < 0:
            raise ins.unknown("the number of groups: expected an immediate")
        left = keep.value
        return lambda m, mask: m.wait_copies(left, mask)
    return _issue(ins, mods, kernel)


def _commit(m: Machine, mask: Mask) -> None:
    m.group = m.group + (1 if mask is None else mask.astype(np.int64))


def _issue(ins: Instruction, mods: Modifiers, kernel: Kernel) -> Execute:
    path = mods.one_of("ca", "cg")
    if not mods.flag("shared", "shared::cta"):
        raise ins.unknown("destination: only shared memory is modelled")
    mods.sequence("global")
    policy = mods.flag("L2::cache_hint")
    mods.any_of("L2::64B", "L2::128B", "L2::256B")
    mods.end()
    destination, origin, size_operand, *rest = ins.expect(*((4, 5) if policy else (3, 4)))
    if policy:
        source(ins, rest.pop(), B64)
    if not isinstance(size_operand, Immediate) or size_operand.value not in ((16,) if path == "cg" else (4, 8, 16)):
        raise ins.unknown(f"cp-size of .{path}")
    size = size_operand.value
    to, from_ = addresses(ins, destination, kernel), addresses(ins, origin, kernel)
    ignores = bool(rest) and isinstance(rest[0], Register) and rest[0].type.kind == "p"
    third = source(ins, rest[0], PRED if ignores else U32) if rest else None

    def execute(m: Machine, mask: Mask) -> None:
        threads = m.active(mask)
        if third is None:
            sizes = np.full(threads.size, size, np.int64)
        else:
            given = m.vector(third(m))[threads]
            sizes = np.where(given, 0, size) if ignores else given.astype(np.int64)
            if (sizes > size).any():
                raise InvalidOperand(f"src-size {int(sizes.max())} is more than cp-size {size}")
        at = to(m)[threads]
        # read now: a source that changes before the wait is not found out
        values = m.memory.load_part(from_(m)[threads], sizes, size, threads, m.block_number)
        m.shared.begin_copy(at, size, threads)
        m.copies.append(Copy(threads, at, values, m.group[threads]))

    return execute
