"""What the emulator does not know it refuses, with the line; and what it knows is told apart from its neighbours."""

from __future__ import annotations

import numpy as np
import pytest
from ptx import Struct, UnknownPtx, load, run_ptx
from ptx.parse import parse
from ptx_samples import entry, run

#: One a family: what looks like an instruction that is modelled, and is not.
UNKNOWN = [
    "frobnicate.s32 %r1, %r2;",
    "add.s32 %r1, %r2;",
    "add.s32 %r1, %r2, %r3, %r4;",
    "add.cc.s32 %r1, %r2, %r3;",
    "add.rz.f32 %r1, %r2, %r3;",
    "add.s8 %r1, %r2, %r3;",
    "add.b32 %r1, %r2, %r3;",
    "add.s32 %d1, %r2, %r3;",
    "add.s32 %p1, %r2, %r3;",
    "add.f32 %r1, %r2, 1;",
    "add.s32 %r1, %r2, 0x100000000;",
    "add.s32 %r1, %nosuch, %r3;",
    "mul.s32 %r1, %r2, %r3;",
    "mul.wide.s64 %d1, %d2, %d3;",
    "mad.hi.cc.s32 %r1, %r2, %r3, %r4;",
    "max.s32 %r1, %r2, %r3, %r4;",
    "max.xorsign.abs.f32 %r1, %r2, %r3;",
    "max.f16 %h1, %h2, %h3, %h4;",
    "fma.f32 %r1, %r2, %r3, %r4;",
    "fma.rz.f16 %h1, %h2, %h3, %h4;",
    "copysign.f64 %d1, %d2, %d3;",
    "fma.rn.relu.f16 %h1, %h2, %h3, %h4;",
    "ex2.approx.f16 %h1, %h2;",
    "ex2.f32 %r1, %r2;",
    "sin.approx.f32 %r1, %r2;",
    "div.rz.f32 %r1, %r2, %r3;",
    "shl.s32 %r1, %r2, 3;",
    "shl.b32 %r1, %r2, %d3;",
    "lop3.b32 %r1, %r2, %r3, %r4, 256;",
    "lop3.or.b32 %r1|%p1, %r2, %r3, %r4, 1, %p2;",
    "prmt.b32.f4e %r1, %r2, %r3, %r4;",
    "setp.lo.s32 %p1, %r2, %r3;",
    "setp.lt.b32 %p1, %r2, %r3;",
    "setp.foo.s32 %p1, %r2, %r3;",
    "selp.pred %p1, %p2, %p3, %p4;",
    "cvt.f16.f32 %h1, %r2;",
    "cvt.rz.f16.f32 %h1, %r2;",
    "cvt.rn.satfinite.e4m3x2.f32 %h1, %r2, %r3;",
    "cvt.s32.f32 %r1, %r2;",
    "cvt.rn.f32.s32 %d1, %r2;",
    "mov.b32 %d1, %r1;",
    "mov.b32 %r1, {%h1, %h2, %h3};",
    "mov.u32 %r1, %clock;",
    "mov.u32 %r1, nosuchvariable;",
    "ld.b32 %r1, [%d1];",
    "ld.local.b32 %r1, [%d1];",
    "ld.const.b32 %r1, [%d1];",
    "ld.global.v2.b32 %r1, [%d1];",
    "ld.global.v2.b32 {%r1, %r2, %r3}, [%d1];",
    "ld.global.b64 %r1, [%d1];",
    "ld.global.unheard.b32 %r1, [%d1];",
    "ld.global.L1::foo.b32 %r1, [%d1];",
    "ld.acquire.global.b32 %r1, [%d1];",
    "ld.global.b32 %r1, %d1;",
    "ld.param.u64 %d1, [nosuch];",
    "ld.param.u32 %r1, [p0+8];",
    "ld.param.v2.u64 {%d1, %d2}, [p0];",
    "st.global.b32 [%d1], {%r1, %r2};",
    "st.global.b32 [%d1], %p1;",
    "atom.shared.add.u32 %r1, [%r2], 1;",
    "atom.global.inc.u32 %r1, [%d2], 1;",
    "red.global.cas.b32 [%d1], %r1, %r2;",
    "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [%r2];",
    "ldmatrix.sync.aligned.m8n16.x1.shared.b8x16 {%r1}, [%r2];",
    "ldmatrix.sync.aligned.m8n8.x4.b16 {%r1, %r2, %r3, %r4}, [%r2];",
    "cp.async.cg.shared.global [%r1], [%d1], 8;",
    "cp.async.ca.shared.global [%r1], [%d1], 32;",
    "cp.async.ca.shared.global [%r1], [%d1], %r2;",
    "cp.async.wait_group %r1;",
    "cp.async.bulk.commit_group;",
    "cp.async.mbarrier.arrive.shared.b64 [%r1];",
    "shfl.bfly.b32 %r1, %r2, 1, 31;",
    "shfl.sync.bfly.b64 %d1, %d2, 1, 31, -1;",
    "vote.any.pred %p1, %p2;",
    "redux.sync.add.f32 %r1, %r2, -1;",
    "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 %C, %A, %B, %C;",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 %C, %A, %B, %C;",
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 %C, {%r5,%r6}, %B, %C;",
    "mma.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 %C, %A, %B, %C;",
    "mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 %C, %A, %A, %C, %r9, 1;",
    "mma.sp.sync.aligned.m16n8k64.row.col.s32.s8.s8.s32 %C, %A, %A, %C, %r9;",
    "mma.sp.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 %C, %B, %B, %C, %r9, 2;",
    "mma.sp.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 %C, %A, %A, %C, %r9, 0;",
    "mma.sp.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 %C, %B, %B, %C, %r9, 0;",
    "mma.sp.sync.aligned.m16n8k64.row.col.f32.f16.f16.f32 %C, %A, %A, %C, %r9, 0;",
    "mma.sp.sync.aligned.m16n8k64.row.col.f32.e4m3.e4m3.f32 %C, %A, %A, %C, %r9, 0;",
    "wgmma.fence.sync.aligned;",
    "mbarrier.init.shared.b64 [%r1], 1;",
    "bar.sync 1;",
    "bar.sync 0, 64;",
    "bar.arrive 0, 64;",
    "bar.red.popc.u32 %r1, 0, %p1;",
    "barrier.cluster.arrive;",
    "@%p1 bar.sync 0;",
    "bra NOWHERE;",
    "brx.idx %r1, table;",
    "call foo;",
    "trap;",
    "fence.proxy.async;",
    "@%r1 mov.u32 %r2, 0;",
    "add.s32 %r1, %r2, %r3",
]  # fmt: skip
#: Registers of mma, written short above.
SHORT = {"%A": "{%r5, %r6, %r7, %r8}", "%B": "{%r9, %r10}", "%C": "{%r1, %r2, %r3, %r4}"}


@pytest.mark.parametrize("instruction", UNKNOWN)
def test_unknown_words_raise_with_their_line(instruction):
    for short, registers in SHORT.items():
        instruction = instruction.replace(short, registers)
    # after the end: what never runs is checked too
    text = entry(f"ret;\n{instruction}")
    line = text.splitlines().index(instruction) + 1
    with pytest.raises(UnknownPtx, match=rf"line {line}\b"):
        load(text)


@pytest.mark.parametrize(
    "text",
    [
        ".local .align 4 .b8 depot[16];",
        ".reg .b128 %q1;",
        ".shared .align 4 .u128 s[4];",
        ".branchtargets A, B;",
    ],
)
def test_unknown_declarations_raise(text):
    with pytest.raises(UnknownPtx, match="line"):
        load(entry(text))


def test_a_kernel_is_chosen_by_name():
    text = entry("") + entry("").replace("entry k", "entry other").split("\n", 3)[3]
    assert set(parse(text)) == {"k", "other"}
    with pytest.raises(UnknownPtx, match="name one"):
        load(text)
    with pytest.raises(UnknownPtx, match="got missing"):
        load(text, "missing")
    with pytest.raises(UnknownPtx, match="no .entry"):
        load(".version 8.0\n")


def test_arguments_are_checked():
    x = np.zeros(4, np.int32)
    text = entry("")
    with pytest.raises(ValueError, match="got 2, expected 1"):
        run_ptx(text, "k", (1, 1, 1), (32, 1, 1), [x, 3])
    with pytest.raises(ValueError, match="u64"):
        run_ptx(text, "k", (1, 1, 1), (32, 1, 1), [1 << 64])
    with pytest.raises(ValueError, match="contiguous"):
        run_ptx(text, "k", (1, 1, 1), (32, 1, 1), [np.zeros((4, 4))[:, 1]])
    with pytest.raises(ValueError, match="at most"):
        run_ptx(text, "k", (1, 1, 1), (2048, 1, 1), [x])


def test_parameters_of_every_type():
    text = """.version 8.7
    .target sm_80
    .visible .entry k(.param .u64 .ptr .global .align 1 out, .param .u32 a, .param .f32 b, .param .u64 c) {
    .reg .b64 %d<4>; .reg .b32 %r<4>;
    ld.param.u64 %d0, [out];
    ld.param.s32 %d1, [a];   // extended by its sign
    ld.param.f32 %r1, [b];
    ld.param.u64 %d2, [c];
    st.global.b64 [%d0], %d1;
    st.global.b32 [%d0+8], %r1; /* a comment
    of two lines */ st.global.b64 [%d0+16], %d2;
    }"""
    out = np.zeros(3, np.int64)
    run_ptx(text, "k", (1, 1, 1), (1, 1, 1), [out, -5, 1.5, -7])
    assert out[0] == -5
    assert out.view(np.float32)[2] == 1.5
    assert out[2] == -7


def test_structures_as_parameters():
    """As nvcc passes them: by address, whole or in parts."""
    text = entry("", 0).replace(
        "entry k()", "entry k(.param .align 8 .b8 s[16], .param .u32 n)"
    ).replace("ret;", """ld.param.u64 %d0, [s];
        mov.b64 %d1, s;
        ld.param.f32 %r1, [%d1+8];
        ld.param.u8 %h1, [s+12];
        add.s64 %d2, %d1, 14;
        ld.param.s16 %r2, [%d2];
        ld.param.u32 %r3, [n];
        cvt.u32.u16 %r4, %h1;
        st.global.v4.b32 [%d0], {%r1, %r2, %r3, %r4};
        ret;""")  # fmt: skip
    out = np.zeros(4, np.int32)
    fields = Struct((out, np.float32(2.5), np.uint8(200), np.int16(-3)))
    run_ptx(text, "k", (1, 1, 1), (1, 1, 1), [fields, 77])
    assert out.view(np.float32)[0] == 2.5
    assert out[1:].tolist() == [-3, 77, 200]
    with pytest.raises(ValueError, match="16 bytes"):
        run_ptx(text, "k", (1, 1, 1), (1, 1, 1), [Struct((out,)), 77])
    with pytest.raises(ValueError, match="numpy scalar"):
        run_ptx(text, "k", (1, 1, 1), (1, 1, 1), [Struct((out, 1, 2)), 77])


def test_registers_have_scopes():
    out = np.zeros(1, np.int32)
    run("mov.b32 %r1, 5;\n{ .reg .b32 %r1; mov.b32 %r1, 9; }\nst.global.b32 [%d0], %r1;", out, threads=1)
    assert out[0] == 5
    with pytest.raises(UnknownPtx, match="inner"):
        load(entry("{ .reg .b32 inner; mov.b32 inner, 9; }\nmov.b32 %r1, inner;"))


def test_shared_variables_follow_one_another():
    declared = ".shared .align 4 .b8 a[6];\n.shared .align 16 .b8 b[16];\n.extern .shared .align 16 .b8 rest[];\n"
    kernel = parse(entry("ret;", outside=declared))["k"]
    assert kernel.shared == {"a": 0, "b": 16, "rest": 1024}
    assert kernel.dynamic == 1024
    # a two-dimensional one within the body, as nvcc writes it
    kernel = parse(entry(".shared .align 2 .b16 t[3][5];"))["k"]
    assert kernel.shared == {"t": 0}
