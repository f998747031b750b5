"""Branches, loops, barriers: threads that part, and how they meet."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import DivergentBarrier, DivergentWarp, Endless, Uninitialised
from ptx.flow import basic_blocks
from ptx.parse import parse
from ptx_samples import entry, run

I32 = np.int32
OUT = "mad.wide.u32 %d9, %r0, 4, %d0;\nst.global.b32 [%d9], %r1;"


def test_both_sides_of_a_branch():
    out = np.zeros(64, I32)
    run("""and.b32 %r2, %r0, 1;
        setp.eq.s32 %p1, %r2, 0;
        @%p1 bra EVEN;
        mov.b32 %r1, 7;
        bra.uni DONE;
        EVEN: mov.b32 %r1, 3;
        DONE: add.s32 %r1, %r1, %r0;""" + OUT, out, threads=64)  # fmt: skip
    assert (out == np.where(np.arange(64) % 2, 7, 3) + np.arange(64)).all()


def test_a_loop_of_each_threads_own_length():
    out = np.zeros(64, I32)
    run("""mov.b32 %r1, 0;
        mov.b32 %r2, 0;
        LOOP: setp.ge.s32 %p1, %r2, %r0;
        @%p1 bra DONE;
        add.s32 %r1, %r1, %r2;
        add.s32 %r2, %r2, 1;
        bra LOOP;
        DONE:""" + OUT, out, threads=64)  # fmt: skip
    assert out.tolist() == [t * (t - 1) // 2 for t in range(64)]


def test_threads_meet_behind_a_loop():
    """All lanes are at the shuffle together although they leave the loop at different times."""
    out = np.zeros(32, I32)
    run("""mov.b32 %r2, 0;
        LOOP: add.s32 %r2, %r2, 1;
        setp.le.s32 %p1, %r2, %r0;
        @%p1 bra LOOP;
        shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;""" + OUT, out)  # fmt: skip
    assert (out == (np.arange(32) ^ 1) + 1).all()


def test_threads_meet_wherever_the_text_has_the_blocks():
    """The common end comes before one of the sides in the text, as compilers lay out what they think is rare."""
    out = np.zeros(32, I32)
    run("""setp.lt.u32 %p1, %r0, 9;
        mov.b32 %r2, 1;
        @%p1 bra RARE;
        END: shfl.sync.bfly.b32 %r1, %r2, 16, 31, -1;
        """ + OUT + """
        ret;
        RARE: mov.b32 %r2, 2;
        bra END;""", out)  # fmt: skip
    assert (out[16:25] == 2).all()
    assert (out[:16] == 1).all()


def test_ranks_put_a_loop_before_what_follows_it():
    text = entry("""A: setp.eq.s32 %p1, %r0, 0;
        @%p1 bra EXIT;
        B: setp.eq.s32 %p2, %r0, 1;
        @%p2 bra A;
        bra B;
        EXIT: add.s32 %r1, %r0, 1;""")
    blocks = basic_blocks(parse(text)["k"])
    by_text = sorted(range(len(blocks)), key=lambda i: blocks[i].rank)
    assert by_text == list(range(len(blocks)))
    # the exit first in the text
    text = entry("""bra LOOP;
        EXIT: ret;
        LOOP: setp.eq.s32 %p1, %r0, 0;
        @%p1 bra LOOP;
        bra EXIT;""")
    kernel = parse(text)["k"]
    blocks = basic_blocks(kernel)
    rank = {name: next(b.rank for b in blocks if b.start == i) for name, i in kernel.labels.items()}
    assert rank["LOOP"] < rank["EXIT"]


def test_exits():
    out = np.zeros(64, I32)
    run("mov.b32 %r1, 5;\nsetp.ge.u32 %p1, %r0, 40;\n@%p1 ret;\n" + OUT, out, threads=64)
    assert (out[:40] == 5).all()
    assert (out[40:] == 0).all()
    run("mov.b32 %r1, 6;\nsetp.ge.u32 %p1, %r0, 40;\n@%p1 bra AWAY;\n" + OUT + "\nAWAY: exit;", out, threads=64)
    assert out.sum() == 240


WARPS_APART = """shr.u32 %r2, %r0, 5;
setp.eq.s32 %p1, %r2, 0;
@%p1 bra FIRST;
{other}
bra DONE;
FIRST: {first}
DONE:
"""


def test_a_warp_may_go_its_own_way_between_barriers():
    out = np.zeros(64, I32)
    apart = WARPS_APART.format(first="mov.b32 %r1, 1;\nst.shared.b32 [0], 9;", other="mov.b32 %r1, 2;")
    run(apart + "bar.sync 0;\nld.shared.b32 %r3, [0];\nadd.s32 %r1, %r1, %r3;\n" + OUT, out, threads=64,
        shared=64)  # fmt: skip
    assert (out == np.where(np.arange(64) < 32, 10, 11)).all()


def test_barriers_in_a_loop():
    out = np.zeros(64, I32)
    run("""mov.b32 %r1, 0;
        mov.b32 %r2, 0;
        shl.b32 %r3, %r0, 2;
        LOOP: st.shared.b32 [%r3], %r2;
        bar.sync 0;
        xor.b32 %r4, %r3, 128;
        ld.shared.b32 %r5, [%r4];
        add.s32 %r1, %r1, %r5;
        bar.sync 0;
        add.s32 %r2, %r2, 1;
        setp.lt.s32 %p1, %r2, 5;
        @%p1 bra LOOP;""" + OUT, out, threads=64, shared=256)  # fmt: skip
    assert (out == 10).all()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        # part of a warp
        ("setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra SKIP;\nbar.sync 0;\nSKIP:", "thread 16 is not"),
        # the other warps never come
        ("setp.lt.u32 %p1, %r0, 32;\n@!%p1 bra SKIP;\nbar.sync 0;\nSKIP:", "has ended"),
        # a barrier behind an early exit
        ("setp.lt.u32 %p1, %r0, 32;\n@!%p1 ret;\nbar.sync 0;", "has ended"),
        # one on each side
        (WARPS_APART.format(first="bar.sync 0;", other="barrier.sync.aligned 0;"), "different barriers"),
        # as often as the thread's number says
        ("mov.b32 %r1, 0;\nL: bar.sync 0;\nadd.s32 %r1, %r1, 1;\nshr.u32 %r2, %r0, 5;\nsetp.le.u32 %p1, %r1, %r2;\n"
         "@%p1 bra L;", "has ended"),
    ],
)  # fmt: skip
def test_barriers_that_not_all_reach(body, message):
    with pytest.raises(DivergentBarrier, match=message):
        run(body, np.zeros(1), threads=64)


def test_a_block_that_does_not_end(monkeypatch):
    monkeypatch.setattr("ptx.machine.MOST_INSTRUCTIONS", 1000)
    with pytest.raises(Endless, match="line"):
        run("L: add.s32 %r1, %r0, 1;\nbra L;", np.zeros(1))


def test_a_branch_by_what_nothing_wrote():
    with pytest.raises(Uninitialised, match=r"line \d+: @%p1 bra L"):
        run("@%p1 bra L;\nmov.b32 %r1, 0;\nL:", np.zeros(1))


def test_a_shuffle_on_one_side_of_a_branch():
    body = "setp.lt.u32 %p1, %r0, 16;\n@!%p1 bra SKIP;\nshfl.sync.bfly.b32 %r1, %r0, 1, 31, {mask};\nSKIP:"
    run(body.format(mask="0xffff"), np.zeros(1))
    with pytest.raises(DivergentWarp):
        run(body.format(mask="-1"), np.zeros(1))


def test_the_grid_and_the_block_have_three_axes():
    from ptx import run_ptx

    out = np.zeros((2, 3, 4, 5, 2, 3), I32)
    text = entry("""mov.u32 %r1, %tid.y; mov.u32 %r2, %tid.z; mov.u32 %r3, %ctaid.x; mov.u32 %r4, %ctaid.y;
        mov.u32 %r5, %ctaid.z; mov.u32 %r6, %nctaid.x; mov.u32 %r7, %nctaid.y; mov.u32 %r8, %ntid.x;
        mov.u32 %r9, %ntid.y; mov.u32 %r10, %ntid.z;
        mad.lo.s32 %r11, %r5, %r7, %r4; mad.lo.s32 %r11, %r11, %r6, %r3; mad.lo.s32 %r11, %r11, %r10, %r2;
        mad.lo.s32 %r11, %r11, %r9, %r1; mad.lo.s32 %r11, %r11, %r8, %r0;
        mad.wide.u32 %d9, %r11, 4, %d0; st.global.b32 [%d9], %r11;""")
    run_ptx(text, "k", (4, 3, 2), (3, 2, 5), [out])
    assert (out.ravel() == np.arange(out.size)).all()
