"""Instructions that tell `warpgroups` which registers of products they touch; none but those pays for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .machine import Execute, Machine
from .program import Address, Immediate, Instruction, Kernel, Not, Operand, Pair, Register, Vector
from .types import Mask


def _registers(operand: Operand) -> list[Register]:
    """All that an operand names."""
    if isinstance(operand, Register):
        return [operand]
    if isinstance(operand, Vector):
        return [r for item in operand.items for r in _registers(item)]
    if isinstance(operand, Pair):
        return _registers(operand.first) + _registers(operand.second)
    if isinstance(operand, Address):
        return _registers(operand.base)
    return [operand.operand] if isinstance(operand, Not) else []


def _copied(ins: Instruction) -> tuple[int, int | None] | None:
    """Of a mov of one register or constant to another: where to and, of a register, where from."""
    if ins.opcode != "mov" or len(ins.operands) != 2:
        return None
    to, origin = ins.operands
    if not isinstance(to, Register) or not isinstance(origin, Register | Immediate):
        return None
    return to.index, origin.index if isinstance(origin, Register) else None


def of_products(kernel: Kernel) -> frozenset[int]:
    """Registers that products of warpgroups hold, and those from which a mov copies into one of them."""
    products = [ins for ins in kernel.instructions if ins.opcode == "wgmma" and ins.modifiers[:1] == ("mma_async",)]
    found = {r.index for ins in products for o in ins.operands[:2] if isinstance(o, Vector) for r in _registers(o)}
    copies = [copy for ins in kernel.instructions if (copy := _copied(ins))]
    size = -1
    while size != len(found):
        size = len(found)
        found |= {origin for to, origin in copies if to in found and origin is not None}
    return frozenset(found)


def watched(execute: Execute, ins: Instruction, held: frozenset[int]) -> Execute:
    """`execute`, which tells what it does to the registers `held`."""
    if not held:
        return execute
    used = frozenset(r.index for o in ins.operands for r in _registers(o)) & held
    if not used or ins.opcode == "wgmma":
        return execute
    copy = _copied(ins)

    def telling(m: Machine, mask: Mask) -> None:
        groups: Sequence[int] = range(len(m.warpgroups.state))
        if mask is not None:
            groups = np.unique(np.flatnonzero(mask) // 128).tolist()
        if copy is None:
            m.warpgroups.touch(groups, used)
        else:
            m.warpgroups.copy(groups, *copy, mask is None)
        execute(m, mask)

    return telling
