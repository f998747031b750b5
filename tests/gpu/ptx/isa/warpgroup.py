"""wgmma: products of a warpgroup, four warps, that run beside them. sm_90a.

ISA 9.7.15. D [64, n] += A [64, k] B [k, n]; k is 32 bytes. Warp w of the four has rows 16 w … of D, and of A where that
is in registers, each 8 columns of D as in an mma of m16n8 (`matrix`). B lies in shared memory, as may A: the operand is
a descriptor (`matrix_descriptor`). Integers wrap, or with .satfinite are clamped; floats are taken as added exactly and
rounded once an instruction.
"""

from __future__ import annotations

import numpy as np

from ..errors import DivergentWarp, InvalidOperand
from ..machine import Execute, Machine
from ..operands import Read, items, sink, source
from ..program import Immediate, Instruction, Kernel, Modifiers, Operand, Register, Vector
from ..registry import opcode
from ..types import B32, B64, F32, PRED, S32, Array, Mask
from .fragments import ELEMENTS, fragment_a, gather, to_int32
from .matrix_descriptor import matrix_bytes


def whole_warpgroups(m: Machine, mask: Mask, what: str) -> list[int]:
    """Numbers of the warpgroups that take part, all of whose 128 threads have to."""
    if m.threads % 128:
        raise DivergentWarp(f"{what} in a block of {m.threads} threads: the last warpgroup is not whole")
    if mask is None:
        return list(range(m.threads // 128))
    there = mask.reshape(-1, 128)
    some = there.any(1)
    partial = some & ~there.all(1)
    if partial.any():
        raise DivergentWarp(f"{what}: warpgroup {int(np.flatnonzero(partial)[0])} is not all there")
    return [int(g) for g in np.flatnonzero(some)]


@opcode("wgmma")
def _wgmma(ins: Instruction, kernel: Kernel) -> Execute:
    if kernel.target != "sm_90a":
        raise ins.unknown(f"target {kernel.target}: wgmma is of sm_90a alone")
    mods = Modifiers(ins)
    name = mods.one_of("mma_async", "fence", "commit_group", "wait_group")
    mods.sequence("sync", "aligned")
    if name == "mma_async":
        return _product(ins, mods)
    mods.end()
    if name == "wait_group":
        (keep,) = ins.expect(1)
        if not isinstance(keep, Immediate) or keep.value < 0:
            raise ins.unknown("the number of groups: expected an immediate")
        left = keep.value
        return lambda m, mask: m.warpgroups.wait(whole_warpgroups(m, mask, "wgmma.wait_group"), left, m.shared)
    ins.expect(0)
    if name == "fence":
        return lambda m, mask: m.warpgroups.fence(whole_warpgroups(m, mask, "wgmma.fence"))
    return lambda m, mask: m.warpgroups.commit(whole_warpgroups(m, mask, "wgmma.commit_group"))


def _uniform(m: Machine, read: Read, group: int, what: str) -> Array:
    """An operand that all threads of a warpgroup have to give alike."""
    values = m.vector(read(m))[128 * group : 128 * group + 128]
    if (values != values[0]).any():
        raise InvalidOperand(f"{what}: the threads of warpgroup {group} do not agree")
    return values[0]


def _shape(ins: Instruction, mods: Modifiers) -> tuple[str, int, str]:
    """The word for it, n, and the type of A and B."""
    shape = mods.left.pop(0) if mods.left else ""
    satfinite = mods.flag("satfinite")
    types = tuple(mods.left)
    integer = types[:1] == ("s32",)
    known = (
        [("s32", a, b) for a in ("s8", "u8") for b in ("s8", "u8")]
        if integer
        else [("f32", x, x) for x in ("f16", "bf16")]
    )
    if types not in known or (satfinite and not integer):
        raise ins.unknown("types are not modelled")
    sizes = [n for n in range(8, 257, 8) if not integer or n in (8, 24) or n % 16 == 0]
    shapes = {f"m64n{n}k{32 if integer else 16}": n for n in sizes}
    if shape not in shapes:
        raise ins.unknown(f"shape .{shape} of .{types[1]}")
    return shape, shapes[shape], "satfinite" if satfinite else ""


def _one(ins: Instruction, operand: Operand, values: tuple[int, ...], what: str) -> int:
    if not isinstance(operand, Immediate) or operand.value not in values:
        raise ins.unknown(f"{what}: expected one of {values}")
    return operand.value


def _product(ins: Instruction, mods: Modifiers) -> Execute:
    shape, n, satfinite = _shape(ins, mods)
    d_type, a_type, b_type = mods.left
    integer = d_type == "s32"
    destination, a, b, scale, *rest = ins.expect(4) if integer else ins.expect(7, 8)
    in_registers = isinstance(a, Vector)
    if not integer and len(rest) != (3 if in_registers else 4):
        raise ins.unknown("operands: expected two scales, and whether each matrix in shared memory is transposed")
    scales = [_one(ins, o, (-1, 1), "scale") for o in rest[:2]]
    transposed = [bool(_one(ins, o, (0, 1), "transposition")) for o in rest[2:]]
    sign = int(np.prod(scales))
    trans_b = transposed[-1] if transposed else False
    trans_a = transposed[0] if len(transposed) == 2 else False
    result = S32 if integer else F32
    accumulators = items(destination)
    if len(accumulators) != n // 2 or (in_registers and len(items(a)) != 4):
        raise ins.unknown("numbers of registers")
    writes, reads = [sink(ins, x, result) for x in accumulators], [source(ins, x, result) for x in accumulators]
    read_a = [source(ins, x, B32) for x in items(a)] if in_registers else [source(ins, a, B64)]
    read_b, read_scale = source(ins, b, B64), source(ins, scale, PRED)
    d_registers = [x for x in accumulators if isinstance(x, Register)]
    a_registers = [x for x in items(a) if isinstance(x, Register)] if in_registers else []
    if len({r.index for r in d_registers}) != n // 2:
        raise ins.unknown("accumulator: expected registers that differ")
    (e, widen_a), (_, widen_b) = ELEMENTS[a_type], ELEMENTS[b_type]

    def stored(m: Machine, read: Read, group: int, rows: int, rows_first: bool, what: str) -> Array:
        """[rows, 32 bytes], as it comes from shared memory."""
        index = matrix_bytes(int(_uniform(m, read, group, f"descriptor of {what}")), rows, rows_first)
        at = index.ravel()
        content = m.shared.begin_read(at, np.arange(4 * group, 4 * group + 4), f"wgmma reads {what}")
        m.warpgroups.reads(group, at)
        content = content.reshape(index.shape)
        return np.ascontiguousarray(content.view(np.uint16).T) if rows_first else content

    def execute(m: Machine, mask: Mask) -> None:
        groups = whole_warpgroups(m, mask, "wgmma")
        for g in groups:
            m.warpgroups.issue(g, shape, d_registers, a_registers)
        warps = np.array([4 * g + w for g in groups for w in range(4)])
        if in_registers:
            raw = gather(m, read_a, warps)
            x = fragment_a(widen_a(raw).reshape(len(warps), 4, 32, e), e).reshape(len(groups), 64, 8 * e)
        else:
            x = np.stack([widen_a(stored(m, read_a[0], g, 64, trans_a, "A")) for g in groups])
        y = np.stack([widen_b(stored(m, read_b, g, n, trans_b, "B")) for g in groups])
        total = sign * np.matmul(x, y.transpose(0, 2, 1))
        old = accumulator(gather(m, reads, warps), len(groups)).astype(np.float64)
        keep = [bool(_uniform(m, read_scale, g, "scale-d")) for g in groups]
        # 0 · NaN: what is not wanted is not there
        total = total + np.where(np.array(keep)[:, None, None], old, 0)
        new = to_int32(total, bool(satfinite)) if integer else total.astype(np.float32)
        values = registers_of(new)
        everywhere = np.zeros((n // 2, m.threads // 32, 32), values.dtype)
        everywhere[:, warps] = values
        flat = everywhere.reshape(n // 2, m.threads)
        for i, write in enumerate(writes):
            write(m, flat[i], mask)

    return execute


def accumulator(registers: Array, groups: int) -> Array:
    """[warps, n / 2, 32] to [groups, 64, n]."""
    warps, count = registers.shape[:2]
    # warp, 8 columns, upper or lower rows, column of two, row, two columns
    parts = registers.reshape(warps, count // 4, 2, 2, 8, 4).transpose(0, 2, 4, 1, 5, 3)
    return parts.reshape(groups, 64, 2 * count)


def registers_of(d: Array) -> Array:
    """[groups, 64, n] to [n / 2, warps, 32]."""
    groups, _, n = d.shape
    parts = d.reshape(4 * groups, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4)
    return parts.reshape(n // 2, 4 * groups, 32)
