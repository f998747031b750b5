"""Every kernel of `kernels/triton` compiles for every GPU that it is shipped for, in every tile size that it may get
there; it fits the GPU's shared memory and uses its matrix unit."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton_cases

triton_cases.require_compiler()

from aot import CompileError, Launch, compile_launch, launches  # noqa: E402
from tcompress.kernels.triton.attention import attention  # noqa: E402
from tcompress.kernels.triton.linear import linear  # noqa: E402
from tcompress.kernels.triton.quantize_tokens import quantize_tokens  # noqa: E402

F16, BF16, F32, I8 = torch.float16, torch.bfloat16, torch.float32, torch.int8
ALL = [80, 86, 89, 90, 100, 120, "gfx90a", "gfx942"]
#: Bytes of shared memory that a program may have (CUDA C++ programming guide, table of compute capabilities; AMD: LDS).
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx90a": 64, "gfx942": 64}
#: What a product of int8 looks like in the assembly. 9.0 has the asynchronous one; the tile of few tokens is too low
#: for it.
INT8_PRODUCT = {
    90: ("wgmma.mma_async.sync.aligned.m64n", "m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
    "gfx90a": ("v_mfma_i32_",), "gfx942": ("v_mfma_i32_",),
}  # fmt: skip


def tensor(*shape: int, dtype: torch.dtype = F16) -> torch.Tensor:
    """Without data: nothing is run."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def attend(head: int, sq: int, dtype: torch.dtype = F16, mask: torch.dtype | None = None, **kwargs: bool) -> None:
    q, k, v = (tensor(1, h, sq, head, dtype=dtype) for h in (4, 2, 2))
    m = None if mask is None else tensor(1, 1, sq, sq, dtype=mask).expand(1, 4, sq, sq)
    attention(q, k, v, m, **kwargs)


def multiply(
    m: int, n: int, k: int, dtype: torch.dtype = F16, activation: str = "none", symmetric: bool = True
) -> None:
    full = activation != "none"
    linear(
        tensor(m, k, dtype=dtype), tensor(n, k, dtype=I8), tensor(n, dtype=F32), tensor(n, dtype=F32) if full else None,
        None, 8 if symmetric else 7, symmetric, activation, None, tensor(m, n, dtype=dtype) if full else None,
    )  # fmt: skip


def few() -> None:
    attend(128, 4096, causal=True)
    multiply(16, 100, 71, BF16, "gelu", symmetric=False)
    multiply(8192, 4096, 4096)


def every() -> None:
    for head in (32, 64, 128, 256):
        for sq in (64, 4096):
            for causal in (False, True):
                attend(head, sq, causal=causal, return_lse=causal)
        attend(head, 300, dtype=BF16, mask=torch.bool, causal=True)
        attend(head, 300, dtype=F32, mask=F32)
    for m in (1, 16, 32, 64, 128, 8192):
        for n, k in ((4096, 4096), (11008, 4096), (1024, 8192), (100, 71)):
            multiply(m, n, k)
        multiply(m, 4096, 4096, BF16, "gelu", symmetric=False)
        multiply(m, 100, 71, F32, "gelu_tanh", symmetric=False)
        multiply(m, 100, 64, F32, "silu")
    for k in (8, 300, 4096, 9001):
        quantize_tokens(tensor(5, k, dtype=F16))
        quantize_tokens(tensor(5, k, dtype=BF16), 7, False)
        quantize_tokens(tensor(5, k, dtype=F32), 4)


def shipped(architecture: int | str, cases) -> list[Launch]:
    """What the launchers start on that GPU, each specialization once."""
    found: list[Launch] = []
    with launches(architecture if isinstance(architecture, int) else 80, found.append):
        cases()
    described = {}
    for launch in found:
        values = [(x.dtype, x.storage_offset() % 16) if isinstance(x, torch.Tensor) else x for x in launch.args]
        described[launch.module, launch.kernel, str(values), str(launch.kwargs)] = launch
    return list(described.values())


def defect(launch: Launch, architecture: int | str) -> str | None:
    name = f"{launch.kernel} {launch.kwargs}"
    try:
        compiled = compile_launch(launch, architecture)
    except CompileError as error:
        return f"{name}: {error}"
    assembly = compiled.asm.get("ptx") or compiled.asm["amdgcn"]
    if not compiled.binary:
        return f"{name}: no machine code"
    if compiled.shared > 1024 * SHARED[architecture]:
        return f"{name}: {compiled.shared} bytes of shared memory"
    if launch.kernel in ("attend", "linear_wide", "linear_narrow"):
        usual = ("m16n8k32.row.col.satfinite.s32.s8.s8.s32",)
        if not any(word in assembly for word in INT8_PRODUCT.get(architecture, usual)):
            return f"{name}: no matrix instruction of int8"
    return None


# for 8.0 and 8.9 others are compiled and run, in test_triton_emulated
@pytest.mark.parametrize("architecture", [90, "gfx942"])
def test_some_of_the_kernels(architecture):
    assert [d for launch in shipped(architecture, few) if (d := defect(launch, architecture))] == []


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ALL)
def test_every_kernel_in_every_tile(architecture):
    # each starts a compiler's process; other processes of pytest, if there are any, do so too
    beside = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    with ThreadPoolExecutor(max(1, min(4, (os.cpu_count() or 1) // beside))) as pool:
        found = pool.map(lambda launch: defect(launch, architecture), shipped(architecture, every))
    assert [d for d in found if d] == []


def test_what_does_not_compile_is_reported():
    """int8 products need 8.0."""
    with launches(80, (found := []).append):
        attend(64, 64)
    with pytest.raises(CompileError, match="Traceback"):
        compile_launch(found[-1], 75)
