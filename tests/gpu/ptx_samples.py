"""Small kernels in PTX for the emulator's own tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from ptx import run_ptx

HEAD = ".version 8.7\n.target {}\n.address_size 64\n"
#: Register letter of each width in `entry`.
DECLARED = """.reg .pred %p<32>;
.reg .b16 %h<32>;
.reg .b32 %r<64>;
.reg .b64 %d<64>;
"""


def entry(body: str, pointers: int = 1, outside: str = "", target: str = "sm_80") -> str:
    """A kernel `k` with that many pointers as parameters, in %d0, %d1, …; %r0 is the thread's number."""
    parameters = ", ".join(f".param .u64 p{i}" for i in range(pointers))
    loads = "".join(f"ld.param.u64 %d{i}, [p{i}];\n" for i in range(pointers))
    head = f"{HEAD.format(target)}{outside}.visible .entry k({parameters})\n"
    return f"{head}{{\n{DECLARED}{loads}mov.u32 %r0, %tid.x;\n{body}\nret;\n}}\n"


def run(body: str, *arrays: Any, threads: int = 32, blocks: int = 1, shared: int = 0, **kwargs: Any) -> int:
    """`entry` on these buffers."""
    text = entry(body, len(arrays), kwargs.pop("outside", ""), kwargs.pop("target", "sm_80"))
    return run_ptx(text, "k", (blocks, 1, 1), (threads, 1, 1), arrays, shared, **kwargs)


def evaluate(instruction: str, inputs: list[np.ndarray], result: type | np.dtype) -> np.ndarray:
    """One instruction on vectors: `d` is its result, `a`, `b`, `c`, `e` its inputs.

    Inputs of 16 bits or more lie in registers of their width; bool is a predicate, as is a result of bool.
    """
    n = inputs[0].size
    result = np.dtype(result)
    lines = []
    for i, (name, x) in enumerate(zip("abce", inputs, strict=False)):
        width = 8 * x.itemsize
        if x.dtype == bool:
            lines.append(f".reg .pred {name}; .reg .b16 {name}_;")
            lines.append(f"mad.wide.u32 %d{10 + i}, %r0, 1, %d{i + 1};\nld.global.u8 {name}_, [%d{10 + i}];")
            lines.append(f"setp.ne.b16 {name}, {name}_, 0;")
        else:
            lines.append(f".reg .b{width} {name};")
            lines.append(f"mad.wide.u32 %d{10 + i}, %r0, {x.itemsize}, %d{i + 1};")
            lines.append(f"ld.global.b{width} {name}, [%d{10 + i}];")
    boolean = result.kind == "b"
    size = 2 if boolean else result.itemsize
    lines.append(f"mad.wide.u32 %d30, %r0, {size}, %d0;")
    if boolean:
        lines.append(f".reg .pred d;\n{instruction}\nselp.b16 %h0, 1, 0, d;\nst.global.b16 [%d30], %h0;")
    else:
        lines.append(f".reg .b{8 * size} d;\n{instruction}\nst.global.b{8 * size} [%d30], d;")
    out = np.zeros(n, np.uint16 if boolean else result)
    raw = [np.ascontiguousarray(x) for x in inputs]
    run("\n".join(lines), out, *raw, threads=n)
    return out.astype(bool) if boolean else out
