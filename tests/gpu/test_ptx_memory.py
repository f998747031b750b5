"""The emulator's memory: accesses, and every defect that they can have."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import AsyncNotWaited, Buffer, InvalidOperand, Misaligned, OutOfBounds, Race, Uninitialised
from ptx.memory import POISON, GlobalMemory
from ptx_samples import run

I32 = np.int32


def at(size: int, base: str = "%d0", to: str = "%d9") -> str:
    return f"mad.wide.u32 {to}, %r0, {size}, {base};\n"


def test_vectors_and_narrow_types():
    x = np.arange(128, dtype=I32)
    out = np.zeros_like(x)
    run(at(16, "%d1") + at(16, to="%d8") + "ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d9];\n"
        "st.global.v2.b32 [%d8], {%r4, %r3};\nst.global.v2.b32 [%d8+8], {%r2, %r1};", out, x)  # fmt: skip
    assert (out.reshape(-1, 4) == x.reshape(-1, 4)[:, ::-1]).all()
    bytes_ = np.arange(-16, 16, dtype=np.int8)
    wide = np.zeros(32, I32)
    run(at(1, "%d1") + at(4, to="%d8") + "ld.global.s8 %r1, [%d9];\nst.global.b32 [%d8], %r1;", wide, bytes_)
    assert (wide == bytes_).all()
    run(at(1, "%d1") + at(4, to="%d8") + "ld.global.nc.L1::no_allocate.L2::128B.u8 %r1, [%d9];\n"
        "st.global.wt.b32 [%d8], %r1;", wide, bytes_)  # fmt: skip
    assert (wide == bytes_.view(np.uint8)).all()


def test_a_guard_spares_the_others():
    out = np.full(32, 7, I32)
    run(at(4) + "setp.lt.u32 %p1, %r0, 5;\n@%p1 st.global.b32 [%d9], %r0;", out)
    assert out[:5].tolist() == [0, 1, 2, 3, 4]
    assert (out[5:] == 7).all()
    # threads without the guard may have any address
    run(at(4) + "setp.lt.u32 %p1, %r0, 5;\n@!%p1 mov.b64 %d9, 3;\n@%p1 st.global.b32 [%d9], %r0;", out)


@pytest.mark.parametrize("n", [31, 5])
@pytest.mark.parametrize("access", ["ld.global.b32 %r1, [%d9];", "st.global.b32 [%d9], %r0;"])
def test_one_element_too_many(n, access):
    with pytest.raises(OutOfBounds, match=rf"thread {n}, .*line \d+: {access[:4]}"):
        run(at(4) + access, np.zeros(n, I32))


def test_before_the_first_and_a_lost_upper_half():
    x = np.zeros(32, I32)
    with pytest.raises(OutOfBounds, match="thread 0"):
        run(at(4) + "ld.global.b32 %r1, [%d9+-4];", x)
    with pytest.raises(OutOfBounds):
        run("cvt.u32.u64 %r1, %d0;\nld.global.b32 %r1, [%r1];", x)
    with pytest.raises(OutOfBounds):
        run("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0];", np.zeros(3, I32))


@pytest.mark.parametrize(
    ("access", "offset"),
    [("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d0+8];", 0), ("ld.global.b32 %r1, [%d0];", 2),
     ("st.global.b64 [%d0+4], %d0;", 0), ("ld.shared.b32 %r1, [2];", 0), ("st.shared.v2.b32 [4], {%r0, %r0};", 0)],
)  # fmt: skip
def test_misaligned(access, offset):
    with pytest.raises(Misaligned, match="thread 0"):
        run(access, Buffer(np.zeros(32, I32), misalign=offset), shared=64)


def test_shared_memory_ends():
    run("setp.eq.s32 %p1, %r0, 0;\n@%p1 st.shared.b32 [60], %r0;", np.zeros(1), shared=64)
    for access in ("st.shared.b32 [64], %r0;", "st.shared.b32 [-4], %r0;", "ld.shared.b32 %r1, [64];"):
        with pytest.raises(OutOfBounds):
            run(access, np.zeros(1), shared=64)


def test_what_nothing_wrote():
    with pytest.raises(Uninitialised, match="shared load"):
        run("ld.shared.b32 %r1, [0];", np.zeros(1), shared=64)
    with pytest.raises(Uninitialised, match="global load"):
        run("ld.global.b32 %r1, [%d0];", Buffer(np.zeros(1, I32), written=False))
    # half of it
    with pytest.raises(Uninitialised):
        run("setp.eq.s32 %p1, %r0, 0;\n@%p1 st.shared.b16 [0], %h0;\nbar.sync 0;\nld.shared.b32 %r1, [0];", np.zeros(1),
            shared=64)  # fmt: skip
    with pytest.raises(Uninitialised, match="predicate"):
        run("@%p1 mov.u32 %r1, 0;", np.zeros(1))
    with pytest.raises(Uninitialised, match="address"):
        run("ld.global.b32 %r1, [%d9];", np.zeros(1))


def test_what_nothing_wrote_may_be_allowed():
    memory = GlobalMemory()
    start = memory.add(np.zeros(64, np.uint8), written=False)
    memory.freeze()
    memory.new_launch()
    where = np.array([start]), 4, 4, np.array([0]), 0
    with pytest.raises(Uninitialised):
        memory.load(*where)
    memory.allow_unwritten()
    assert memory.load(*where).item() == int.from_bytes(bytes([POISON] * 4), "little")
    with pytest.raises(OutOfBounds):
        memory.load(np.array([start + 64]), *where[1:])


def test_a_register_that_some_threads_wrote_is_poison_for_the_others():
    out = np.zeros(32, I32)
    run(at(4) + "setp.lt.u32 %p1, %r0, 3;\n@%p1 mov.u32 %r1, 1;\nst.global.b32 [%d9], %r1;", out)
    assert (out[:3] == 1).all()
    assert (np.isnan(out[3:].view(np.float32))).all()


EXCHANGE = """shl.b32 %r1, %r0, 2;
st.shared.b32 [%r1], %r0;
{barrier}
xor.b32 %r2, %r1, {other};
ld.shared.b32 %r3, [%r2];
{after}
st.shared.b32 [%r1], %r3;
""" + at(4) + "st.global.b32 [%d9], %r3;"  # fmt: skip


def test_warps_exchange_over_barriers():
    out = np.zeros(64, I32)
    run(EXCHANGE.format(barrier="bar.sync 0;", other=128, after="bar.sync 0;"), out, threads=64, shared=256)
    assert (out == np.arange(64) ^ 32).all()
    # within a warp none is needed
    run(EXCHANGE.format(barrier="", other=4, after=""), out, threads=64, shared=256)
    assert (out == np.arange(64) ^ 1).all()


@pytest.mark.parametrize(
    ("barrier", "after", "message"),
    [("", "bar.sync 0;", "load of what another warp wrote"), ("bar.sync 0;", "", "another warp read")],
)
def test_a_missing_barrier_is_a_race(barrier, after, message):
    with pytest.raises(Race, match=message):
        run(EXCHANGE.format(barrier=barrier, other=128, after=after), np.zeros(64, I32), threads=64, shared=256)


def test_two_warps_may_read_the_same_but_not_write_it_then():
    body = "setp.eq.s32 %p1, %r0, 0;\n@%p1 st.shared.b32 [0], %r0;\nbar.sync 0;\nld.shared.b32 %r1, [0];\n"
    run(body, np.zeros(1), threads=128, shared=64)
    # also the last one to read
    for warp in range(4):
        with pytest.raises(Race, match="another warp read"):
            run(body + f"setp.eq.s32 %p2, %r0, {32 * warp};\n@%p2 st.shared.b32 [0], %r0;", np.zeros(1), threads=128,
                shared=64)  # fmt: skip


def test_stores_of_one_instruction():
    run("st.shared.b32 [0], 7;", np.zeros(1), threads=64, shared=64)  # the same value
    with pytest.raises(Race, match="different values at once"):
        run("st.shared.b32 [0], %r0;", np.zeros(1), threads=2, shared=64)
    with pytest.raises(Race, match="different values at once"):
        run("st.global.b32 [%d0], %r0;", np.zeros(1, I32), threads=2)


def test_blocks_do_not_share_what_they_write():
    body = "mov.u32 %r1, %ctaid.x;\n" + at(4) + "st.global.b32 [%d9], %r0;"
    with pytest.raises(Race, match="another block wrote"):
        run(body, np.zeros(32, I32), blocks=2)
    with pytest.raises(Race, match="another block wrote"):
        run("mov.u32 %r1, %ctaid.x;\nsetp.eq.s32 %p1, %r1, 0;\n@%p1 st.global.b32 [%d0], 1;\n@!%p1 ld.global.b32 %r2, "
            "[%d0];", np.zeros(1, I32), blocks=2)  # fmt: skip


LAST_BLOCK_READS = """mov.u32 %r1, %ctaid.x;
mul.wide.u32 %d9, %r1, 4;
add.s64 %d9, %d9, %d0;
st.global.b32 [%d9], 7;
{before}
atom.global.gpu.{order}.add.u32 %r2, [%d1], 1;
{after}
setp.ne.s32 %p1, %r2, 1;
@%p1 ret;
ld.global.cg.v2.b32 {{%r3, %r4}}, [%d0];
add.s32 %r3, %r3, %r4;
st.global.b32 [%d2], %r3;"""


@pytest.mark.parametrize(
    ("before", "order", "after", "ordered"),
    [("", "acq_rel", "", True), ("fence.acq_rel.gpu;", "relaxed", "membar.gl;", True), ("", "relaxed", "", False),
     ("membar.cta;", "relaxed", "membar.cta;", False), ("", "release", "", False)],
)  # fmt: skip
def test_the_last_block_reads_what_the_others_released(before, order, after, ordered):
    body = LAST_BLOCK_READS.format(before=before, order=order, after=after)
    for reverse in (False, True):
        count, total = np.zeros(1, I32), np.zeros(1, I32)
        arrays = (np.zeros(2, I32), count, total)
        if ordered:
            run(body, *arrays, threads=1, blocks=2, reverse=reverse)
            assert total[0] == 14
        else:
            with pytest.raises(Race, match="another block wrote"):
                run(body, *arrays, threads=1, blocks=2, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_atomics(reverse):
    count, highest = np.zeros(1, I32), np.full(1, -5, I32)
    old = np.zeros(128, I32)
    run("mov.u32 %r1, %ctaid.x;\nmad.lo.s32 %r2, %r1, 64, %r0;\nmad.wide.u32 %d9, %r2, 4, %d2;\n"
        "atom.global.gpu.acq_rel.add.u32 %r3, [%d0], 1;\nst.global.b32 [%d9], %r3;\n"
        "red.global.max.s32 [%d1], %r2;", count, highest, old, threads=64, blocks=2, reverse=reverse)  # fmt: skip
    assert count[0] == 128
    assert highest[0] == 127
    assert sorted(old.tolist()) == list(range(128))
    cell, old = np.array([5], I32), np.zeros(32, I32)
    run(at(4, "%d1") + "atom.global.cas.b32 %r1, [%d0], 5, 9;\nst.global.b32 [%d9], %r1;", cell, old)
    assert cell[0] == 9
    assert old[0] == 5
    assert (old[1:] == 9).all()
    total = np.array([0.5], np.float32)
    run("red.global.add.f32 [%d0], 0f3F800000;", total)
    assert total[0] == 32.5


COPY = "shl.b32 %r1, %r0, 4;\n" + at(16, "%d1") + """cp.async.cg.shared.global [%r1], [%d9], 16;
cp.async.commit_group;
{between}
""" + at(4) + "ld.shared.b32 %r3, [%r1];\nst.global.b32 [%d9], %r3;"  # fmt: skip


def test_a_copy_arrives_when_it_is_waited_for():
    x, out = np.arange(128, dtype=I32), np.zeros(32, I32)
    for wait in ("cp.async.wait_group 0;", "cp.async.wait_all;"):
        run(COPY.format(between=wait), out, x, shared=512)
        assert (out == x[::4]).all()


@pytest.mark.parametrize("between", ["", "cp.async.wait_group 1;", "bar.sync 0;"])
def test_a_copy_that_nobody_waited_for(between):
    with pytest.raises(AsyncNotWaited, match="shared load before"):
        run(COPY.format(between=between), np.zeros(32, I32), np.arange(128, dtype=I32), shared=512)


def test_a_copy_that_was_not_committed():
    body = COPY.replace("cp.async.commit_group;", "")
    with pytest.raises(AsyncNotWaited):
        run(body.format(between="cp.async.wait_group 0;"), np.zeros(32, I32), np.arange(128, dtype=I32), shared=512)
    run(body.format(between="cp.async.wait_all;"), np.zeros(32, I32), np.arange(128, dtype=I32), shared=512)


def test_groups_are_waited_for_in_order():
    # three groups into three places; wait_group 1 leaves the last one under way
    issue = "shl.b32 %r1, %r0, 2;\n" + at(4, "%d1") + "".join(
        f"cp.async.ca.shared.global [%r1+{128 * i}], [%d9+{128 * i}], 4;\ncp.async.commit_group;\n" for i in range(3)
    ) + "cp.async.wait_group 1;\n" + at(4)  # fmt: skip
    x, out = np.arange(96, dtype=I32), np.zeros(32, I32)
    for i in range(3):
        body = issue + f"ld.shared.b32 %r3, [%r1+{128 * i}];\nst.global.b32 [%d9], %r3;"
        if i == 2:
            with pytest.raises(AsyncNotWaited):
                run(body, out, x, shared=384)
        else:
            run(body, out, x, shared=384)
            assert (out == x[32 * i : 32 * i + 32]).all()


def test_a_copy_is_for_other_warps_after_a_barrier():
    body = COPY.replace("ld.shared.b32 %r3, [%r1];", "xor.b32 %r4, %r1, 512;\nld.shared.b32 %r3, [%r4];")
    x, out = np.arange(256, dtype=I32), np.zeros(64, I32)
    run(body.format(between="cp.async.wait_group 0;\nbar.sync 0;"), out, x, threads=64, shared=1024)
    assert (out == x[::4].reshape(2, 32)[::-1].ravel()).all()
    with pytest.raises(Race):
        run(body.format(between="cp.async.wait_group 0;"), out, x, threads=64, shared=1024)
    # the barrier comes before the wait: the others' bytes may still be under way
    with pytest.raises((Race, AsyncNotWaited)):
        run(body.format(between="bar.sync 0;\ncp.async.wait_group 0;"), out, x, threads=64, shared=1024)


def test_a_copy_fills_with_zeros():
    x, out = np.arange(1, 129, dtype=I32), np.zeros(128, I32)
    body = "shl.b32 %r1, %r0, 4;\n" + at(16, "%d1") + """and.b32 %r2, %r0, 3;
shl.b32 %r2, %r2, 2;
setp.eq.s32 %p1, %r2, 8;
{copy}
cp.async.wait_all;
ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r1];
""" + at(16) + "st.global.v4.b32 [%d9], {{%r4, %r5, %r6, %r7}};"  # fmt: skip
    run(body.format(copy="cp.async.cg.shared.global [%r1], [%d9], 16, %r2;"), out, x, shared=512)
    expected = x.reshape(32, 4) * (np.arange(4) < np.arange(32)[:, None] % 4)
    assert (out.reshape(32, 4) == expected).all()
    run(body.format(copy="cp.async.cg.shared.global.L2::128B [%r1], [%d9], 16, %p1;"), out, x, shared=512)
    assert (out.reshape(32, 4) == x.reshape(32, 4) * (np.arange(32) % 4 != 2)[:, None]).all()
    with pytest.raises(InvalidOperand, match="src-size 17"):
        run(body.format(copy="cp.async.cg.shared.global [%r1], [%d9], 16, 17;"), out, x, shared=512)
    # of size 0 the source may be anywhere
    run("shl.b32 %r1, %r0, 4;\nmov.b64 %d9, 0;\ncp.async.cg.shared.global [%r1], [%d9], 16, 0;", out, x, shared=512)


def test_defects_of_a_copy():
    copy = "shl.b32 %r1, %r0, 4;\n" + at(16) + "cp.async.cg.shared.global [%r1{to}], [%d9{origin}], 16;\n"
    x = np.arange(128, dtype=I32)
    with pytest.raises(OutOfBounds, match="source"):
        run(copy.format(to="", origin="+16"), x, shared=1024)
    with pytest.raises(OutOfBounds, match="destination"):
        run(copy.format(to="+16", origin=""), x, shared=512)
    with pytest.raises(Misaligned):
        run(copy.format(to="+4", origin=""), x, shared=1024)
    with pytest.raises(Misaligned):
        run(copy.format(to="", origin="+4").replace("%r0, 16", "%r0, 8"), x, shared=1024)
    with pytest.raises(AsyncNotWaited, match="store"):
        run(copy.format(to="", origin="") + "st.shared.b32 [%r1], %r0;", x, shared=512)
    with pytest.raises(AsyncNotWaited, match="cp.async"):
        run(copy.format(to="", origin="") * 2, x, shared=512)
    # the buffer is refilled while another warp reads it
    look = "cp.async.wait_all;\nbar.sync 0;\nxor.b32 %r4, %r1, 512;\nld.shared.b32 %r5, [%r4];\n"
    again = "cp.async.cg.shared.global [%r1], [%d9], 16;\ncp.async.wait_all;"
    refill = COPY.format(between=look + at(16, "%d1") + again)
    with pytest.raises(Race, match="another warp read"):
        run(refill, np.zeros(64, I32), np.arange(256, dtype=I32), threads=64, shared=1024)
