"""What threads of a warp do together, against the formulas of the ISA written out per lane and element."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import DivergentWarp
from ptx_samples import evaluate, run

U32, I32, F32 = np.uint32, np.int32, np.float32


def shuffled(mode: str, a: list[int], b: int, c: int) -> tuple[list[int], list[bool]]:
    """The ISA's pseudocode of shfl, for one warp."""
    values, found = [], []
    for lane in range(32):
        bval, cval, segment = b & 31, c & 31, c >> 8 & 31
        most, least = (lane & segment) | (cval & ~segment), lane & segment
        j = {"up": lane - bval, "down": lane + bval, "bfly": lane ^ bval, "idx": least | (bval & ~segment)}[mode]
        ok = j >= most if mode == "up" else j <= most
        values.append(a[j if ok else lane])
        found.append(ok)
    return values, found


@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
@pytest.mark.parametrize(
    ("b", "c"), [(1, 31), (4, 31), (16, 31), (0, 31), (3, 0x1807), (9, 0x181F), (2, 0), (5, 0x1000)]
)
def test_shfl(mode, b, c):
    x = np.random.default_rng(0).integers(0, 2**32, 64, U32)
    got = evaluate(f"shfl.sync.{mode}.b32 d, a, {b}, {c}, -1;", [x], U32)
    found = evaluate(f".reg .b32 x; shfl.sync.{mode}.b32 x|d, a, {b}, {c}, 0xffffffff;", [x], bool)
    for warp in (slice(0, 32), slice(32, 64)):
        values, ok = shuffled(mode, x[warp].tolist(), b, c)
        assert got[warp].tolist() == values
        assert found[warp].tolist() == ok


def test_votes():
    x = np.random.default_rng(1).integers(0, 2, 64).astype(bool)
    x[32:40] = True
    ballot = [sum(int(v) << i for i, v in enumerate(x[s : s + 32])) for s in (0, 32)]
    assert evaluate("vote.sync.ballot.b32 d, a, -1;", [x], U32).tolist() == [ballot[0]] * 32 + [ballot[1]] * 32
    for mode, expected in (("any", [True, True]), ("all", [False, True]), ("uni", [False, True])):
        y = x.copy()
        y[32:] = True
        got = evaluate(f"vote.sync.{mode}.pred d, a, -1;", [y], bool)
        assert got.tolist() == [expected[0]] * 32 + [expected[1]] * 32
    assert (evaluate("activemask.b32 d;", [x], U32) == 0xFFFFFFFF).all()
    # half of a warp alone
    got = evaluate("setp.lt.u32 %p9, %r0, 16; mov.b32 d, 0; @%p9 vote.sync.ballot.b32 d, a, 0xffff;", [x[:32]], U32)
    assert (got[:16] == ballot[0] & 0xFFFF).all()


@pytest.mark.parametrize(("name", "dtype", "f"), [
    ("add.s32", I32, sum), ("min.s32", I32, min), ("max.s32", I32, max), ("min.u32", U32, min), ("max.u32", U32, max),
])  # fmt: skip
def test_redux(name, dtype, f):
    x = np.random.default_rng(2).integers(np.iinfo(dtype).min // 64, np.iinfo(dtype).max // 64, 64).astype(dtype)
    got = evaluate(f"redux.sync.{name} d, a, -1;", [x], dtype)
    assert got.tolist() == [f(x[:32].tolist())] * 32 + [f(x[32:].tolist())] * 32
    # two groups of a warp at once, each with its own members
    halves = "setp.lt.u32 %p9, %r0, 16; selp.b32 %r9, 0xffff, 0xffff0000, %p9; "
    got = evaluate(halves + f"redux.sync.{name} d, a, %r9;", [x[:32]], dtype)
    assert got.tolist() == [f(x[:16].tolist())] * 16 + [f(x[16:32].tolist())] * 16


SKIP = "setp.eq.s32 %p9, %r0, 5; @%p9 bra AWAY; {ins}\nAWAY:"


@pytest.mark.parametrize("ins", [
    "shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;", "vote.sync.any.pred %p1, %p9, -1;", "redux.sync.add.s32 %r1, %r0, -1;",
    "bar.warp.sync -1;", "shfl.sync.idx.b32 %r1, %r0, 5, 31, 0xffffffdf;", "shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xff;",
    "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [0];",
    "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%r1,%r2,%r3,%r4}, {%r0,%r0}, {%r0}, {%r0,%r0,%r0,%r0};",
])  # fmt: skip
def test_members_that_are_not_there(ins):
    with pytest.raises(DivergentWarp, match="line"):
        run(SKIP.format(ins=ins), np.zeros(1), shared=64)
    run("bar.warp.sync -1;", np.zeros(1))
    run(SKIP.format(ins="bar.warp.sync 0xffffffdf;"), np.zeros(1))


def test_a_block_of_no_whole_warps():
    x = np.arange(40, dtype=U32)
    got = evaluate(
        "setp.lt.u32 %p9, %r0, 32; selp.b32 %r9, -1, 0xff, %p9; shfl.sync.bfly.b32 d, a, 1, 31, %r9;", [x], U32
    )
    assert (got == x ^ 1).all()
    with pytest.raises(DivergentWarp, match="not whole"):
        run("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [0];", np.zeros(1), threads=40, shared=64)


STORE_TILE = """mad.wide.u32 %d9, %r0, 16, %d1;
ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d9];
shl.b32 %r5, %r0, 4;
st.shared.v4.b32 [%r5], {%r1, %r2, %r3, %r4};
bar.sync 0;
"""


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_ldmatrix(n, trans):
    matrices = np.random.default_rng(3).integers(0, 2**16, (4, 8, 8), np.uint16)
    out = np.zeros((32, 4), U32)
    registers = ", ".join(f"%r{10 + i}" for i in range(n))
    stores = "".join(f"st.global.b32 [%d9+{4 * i}], %r{10 + i};\n" for i in range(n))
    run(STORE_TILE + f"ldmatrix.sync.aligned.m8n8.x{n}{trans}.shared.b16 {{{registers}}}, [%r5];\n"
        "mad.wide.u32 %d9, %r0, 16, %d0;\n" + stores, out, matrices, shared=512)  # fmt: skip
    for lane in range(32):
        for i in range(n):
            row, column = lane // 4, lane % 4 * 2
            pair = matrices[i, column : column + 2, row] if trans else matrices[i, row, column : column + 2]
            assert out[lane, i] == int(pair[0]) | int(pair[1]) << 16


@pytest.mark.parametrize("trans", ["", ".trans"])
def test_stmatrix_is_the_inverse(trans):
    matrices = np.random.default_rng(4).integers(0, 2**16, (4, 8, 8), np.uint16)
    out = np.zeros_like(matrices)
    form = f"sync.aligned.m8n8.x4{trans}.shared.b16"
    run(STORE_TILE + f"ldmatrix.{form} {{%r10, %r11, %r12, %r13}}, [%r5];\nbar.sync 0;\nadd.s32 %r6, %r5, 512;\n"
        f"stmatrix.{form} [%r6], {{%r10, %r11, %r12, %r13}};\nbar.sync 0;\nmad.wide.u32 %d9, %r0, 16, %d0;\n"
        "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r6];\nst.global.v4.b32 [%d9], {%r1, %r2, %r3, %r4};",
        out, matrices, shared=1024)  # fmt: skip
    assert (out == matrices).all()


def product(instruction: str, a: list[np.ndarray], b: list[np.ndarray], c: np.ndarray) -> np.ndarray:
    """Registers a, b [lanes] each and c [4, lanes] to d [4, lanes]."""
    registers = [*a, *b, *c.view(U32)]
    block = np.stack(registers).astype(U32)
    loads = "".join(
        f"ld.global.b32 %r{10 + i}, [%d9+{4 * i * block.shape[1]}];\n" for i in range(len(registers))
    )  # fmt: skip
    names = [f"%r{10 + i}" for i in range(len(registers))]
    na, nb = len(a), len(b)
    groups = [names[-4:], names[:na], names[na : na + nb], names[-4:]]
    out = np.zeros((4, block.shape[1]), U32)
    run("mad.wide.u32 %d9, %r0, 4, %d1;\n" + loads + f"{instruction} "
        + ", ".join("{" + ", ".join(g) + "}" for g in groups) + ";\nmad.wide.u32 %d9, %r0, 4, %d0;\n"
        + "".join(f"st.global.b32 [%d9+{4 * i * block.shape[1]}], {r};\n" for i, r in enumerate(names[-4:])),
        out, block, threads=block.shape[1])  # fmt: skip
    return out.view(c.dtype)


def place_a(lane: int, i: int, e: int) -> tuple[int, int]:
    """Row and column of A's element i of a lane: the ISA's formulas, 2 or 4 elements in a register."""
    group, within = lane >> 2, lane % 4
    register = i // e
    return group + 8 * (register % 2), within * e + i % e + 4 * e * (register // 2)


def place_b(lane: int, i: int, e: int) -> tuple[int, int]:
    return (lane % 4) * e + i % e + 4 * e * (i // e), lane >> 2


def place_c(lane: int, i: int) -> tuple[int, int]:
    return (lane >> 2) + 8 * (i // 2), (lane % 4) * 2 + i % 2


def gathered(matrix: np.ndarray, place, count: int, e: int) -> list[np.ndarray]:
    """[16 or k, …] to registers, [lanes] of 32 bits each."""
    elements = np.array([[matrix[place(lane, i, e)] for i in range(count * e)] for lane in range(32)])
    raw = elements.reshape(32, count, e).copy().view(U32)[:, :, 0]
    return [raw[:, i].copy() for i in range(count)]


def test_places_are_those_of_the_isa():
    # m16n8k32, s8: figures of the ISA, some lanes
    assert [place_a(0, i, 4) for i in (0, 3, 4, 8, 12, 15)] == [(0, 0), (0, 3), (8, 0), (0, 16), (8, 16), (8, 19)]
    assert [place_a(31, i, 4) for i in (0, 4, 8)] == [(7, 12), (15, 12), (7, 28)]
    assert [place_b(5, i, 4) for i in (0, 3, 4, 7)] == [(4, 1), (7, 1), (20, 1), (23, 1)]
    # m16n8k16, f16
    assert [place_a(6, i, 2) for i in range(8)] == [(1, 4), (1, 5), (9, 4), (9, 5), (1, 12), (1, 13), (9, 12), (9, 13)]
    assert [place_b(6, i, 2) for i in range(4)] == [(4, 1), (5, 1), (12, 1), (13, 1)]
    assert [place_c(6, i) for i in range(4)] == [(1, 4), (1, 5), (9, 4), (9, 5)]


@pytest.mark.parametrize("k", [16, 32])
@pytest.mark.parametrize(("a_type", "b_type"), [("s8", "s8"), ("u8", "s8"), ("s8", "u8"), ("u8", "u8")])
def test_mma_of_bytes(k, a_type, b_type):
    rng = np.random.default_rng(5)
    numpy_type = {"s8": np.int8, "u8": np.uint8}
    a = rng.integers(-128, 128, (16, k)).astype(np.int8).view(numpy_type[a_type])
    b = rng.integers(-128, 128, (k, 8)).astype(np.int8).view(numpy_type[b_type])
    c = rng.integers(-(2**31), 2**31, (4, 32)).astype(I32)
    got = product(f"mma.sync.aligned.m16n8k{k}.row.col.s32.{a_type}.{b_type}.s32",
                  gathered(a, place_a, k // 8, 4), gathered(b, place_b, k // 16, 4), c)  # fmt: skip
    exact = a.astype(np.int64) @ b.astype(np.int64)
    for lane in range(32):
        for i in range(4):
            total = int(exact[place_c(lane, i)]) + int(c[i, lane])
            assert got[i, lane] == (total + 2**31) % 2**32 - 2**31


def test_mma_saturates():
    full = [np.full(32, 0x7F7F7F7F, U32)] * 4
    c = np.full((4, 32), 2**31 - 100, I32)
    form = "mma.sync.aligned.m16n8k32.row.col{}.s32.s8.s8.s32"
    assert (product(form.format(".satfinite"), full, full[:2], c) == 2**31 - 1).all()
    assert (product(form.format(""), full, full[:2], c) < 0).all()


@pytest.mark.parametrize("k", [8, 16])
@pytest.mark.parametrize("name", ["f16", "bf16"])
def test_mma_of_floats(k, name):
    rng = np.random.default_rng(6)

    def matrix(*shape: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.standard_normal(shape).astype(F32)
        if name == "f16":
            return x.astype(np.float16), x.astype(np.float16).astype(np.float64)
        bits = (x.view(U32) >> 16).astype(np.uint16)
        return bits, (bits.astype(U32) << 16).view(F32).astype(np.float64)

    (a, a_exact), (b, b_exact) = matrix(16, k), matrix(k, 8)
    c = rng.standard_normal((4, 32)).astype(F32)
    got = product(f"mma.sync.aligned.m16n8k{k}.row.col.f32.{name}.{name}.f32",
                  gathered(a, place_a, k // 4, 2), gathered(b, place_b, k // 8, 2), c)  # fmt: skip
    exact = a_exact @ b_exact
    for lane in range(32):
        for i in range(4):
            assert got[i, lane] == pytest.approx(exact[place_c(lane, i)] + float(c[i, lane]), rel=2**-24, abs=1e-12)


def test_warps_of_a_block_multiply_their_own():
    rng = np.random.default_rng(7)
    registers = [rng.integers(0, 2**32, 96, U32) for _ in range(6)]
    c = np.zeros((4, 96), I32)
    form = "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
    together = product(form, registers[:4], registers[4:], c)
    for warp in range(3):
        part = slice(32 * warp, 32 * warp + 32)
        alone = product(form, [r[part] for r in registers[:4]], [r[part] for r in registers[4:]], c[:, part].copy())
        assert (together[:, part] == alone).all()
