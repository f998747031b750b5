"""Compiles the Triton kernels ahead of time, with the very arguments that they are launched with: the launch functions
run on tensors without memory, and each launch is compiled for a GPU that need not be there, and not carried out.

For a process in which Triton does not interpret its kernels (TRITON_INTERPRET).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import gpu_launches
import torch
import triton
from gpu_launches import BF16, empty
from tcompress.kernels.triton import autotune, linear
from tcompress.kernels.triton.tiles import TileConfig
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 89, 90)


@dataclass(frozen=True)
class Compiled:
    """One kernel of a launch: its name, machine code, and what the launch asks for. blocks: its BLOCK_… constants.
    tile: the name of the `TileConfig` that the launch function chose, or empty."""

    kernel: str
    cubin: bytes
    warps: int
    shared: int
    blocks: dict[str, int]
    tile: str


@dataclass(frozen=True)
class Variant:
    """A launch with certain arguments. `kernel`: the one that the variant is there for; the others of the launch are
    compiled too."""

    name: str
    kernel: str
    launch: Callable[[], object]


class _AbsentGPU:
    """What Triton asks of a driver when it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # Triton remembers what it compiled by device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def _compile_launches(architecture: int) -> Iterator[list[Compiled]]:
    """In the `with` block launches are compiled, into the list that this yields."""
    compiled: list[Compiled] = []
    chosen: list[TileConfig] = []
    run, choose = JITFunction.run, autotune.choose

    def named(*args: Any, **options: Any) -> Any:
        chosen.append(choose(*args, **options))
        return chosen[-1]

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        blocks = {name: value for name, value in options.items() if name.startswith("BLOCK_")}
        tile = chosen[-1].name if chosen and blocks.get("BLOCK_M") == chosen[-1].block_m else ""
        compiled.append(Compiled(self.__name__, kernel.asm["cubin"], warps, shared, blocks, tile))
        return kernel

    JITFunction.run, autotune.choose = compile_only, named
    triton.runtime.driver.set_active(_AbsentGPU(architecture))  # it stays: what was before may be none
    try:
        yield compiled
    finally:
        JITFunction.run, autotune.choose = run, choose


def compile_variant(variant: Variant, architecture: int) -> list[Compiled]:
    """The kernels of the variant's launch, in order.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("compile_variant: TRITON_INTERPRET: got 1, expected a process without it")
    with _compile_launches(architecture) as compiled, gpu_launches.on_architecture(architecture):
        variant.launch()
    return compiled


def _linear(m: int, n: int = 4096, k: int = 4096, activation: str = "none") -> object:
    """With a bias of 16 bits and no residual."""
    x, weight = empty(m, k, dtype=BF16), empty(n, k, dtype=torch.int8)
    return linear.linear(x, weight, empty(n, dtype=torch.float32), empty(n, dtype=BF16), activation=activation)


def _variants() -> Iterator[Variant]:
    attend = partial(gpu_launches.attend, heads=2)
    for d in (64, 128, 256):
        for causal in (False, True):
            name = f"attention d{d}" + (" causal" if causal else "")
            yield Variant(name, "attend", partial(attend, d, 4096, causal=causal))
    yield Variant("attention d64 short", "attend", partial(attend, 64, 1024))
    yield Variant("attention d128 causal lse", "attend", partial(attend, 128, 4096, causal=True, return_lse=True))
    for d in (64, 128):
        for kind, mask in (("bool", torch.bool), ("float", torch.float16)):
            yield Variant(f"attention d{d} {kind} mask", "attend", partial(attend, d, 4096, mask=mask))
        for causal in (False, True):
            name = f"attention d{d} values in int8" + (" causal" if causal else "")
            yield Variant(name, "attend", partial(attend, d, 4096, causal=causal, value_bits=8))
        yield Variant(f"attention d{d} varlen causal", "attend_varlen", partial(gpu_launches.varlen, d, right=0))
        for causal in (False, True):
            name = f"attention d{d} 12 bits" + (" causal" if causal else "")
            yield Variant(name, "attend", partial(attend, d, 4096, causal=causal, bits=12))
    yield Variant("attention d64 12 bits short", "attend", partial(attend, 64, 1024, bits=12))
    yield Variant("attention d256 12 bits causal", "attend", partial(attend, 256, 4096, causal=True, bits=12))
    yield Variant("attention d256 12 bits bool mask", "attend", partial(attend, 256, 4096, mask=torch.bool, bits=12))
    varlen_12 = partial(gpu_launches.varlen, 128, right=0, bits=12)
    yield Variant("attention d128 12 bits varlen causal", "attend_varlen", varlen_12)
    yield Variant("attention d128 12 bits, quantizer", "quantize_queries_and_keys", partial(attend, 128, 4096, bits=12))
    yield Variant("attention d128 lse", "quantize_queries_and_keys", partial(attend, 128, 4096, return_lse=True))
    for kernel, name in (("value_ranges", "ranges"), ("quantize_value_blocks", "integers")):
        yield Variant(f"attention d128 values, {name}", kernel, partial(attend, 128, 4096, value_bits=8))
    for kernel, name in (("key_sums_varlen", "means"), ("quantize_varlen", "quantizer")):
        yield Variant(f"attention d128 varlen, {name}", kernel, partial(gpu_launches.varlen, 128, right=0))
    yield Variant("attention d128 means", "key_sums", partial(attend, 128, 4096))
    yield Variant("decode d128", "decode_split", gpu_launches.decode)
    yield Variant("decode d128 batch 16", "decode_split", partial(gpu_launches.decode, batch=16))
    yield Variant("decode d128 reduce", "decode_reduce", gpu_launches.decode)
    yield Variant("linear m8192", "linear_wide", partial(_linear, 8192))
    yield Variant("linear m8192 gelu", "linear_wide", partial(_linear, 8192, activation="gelu"))
    all_of_it = partial(gpu_launches.int8, 8192, dtype=BF16, activation="gelu", symmetric=False)
    yield Variant("linear m8192 gelu, float32 bias, residual, zero points", "linear_wide", all_of_it)
    yield Variant("linear m128", "linear_wide", partial(_linear, 128))
    yield Variant("linear m128 n11008", "linear_wide", partial(_linear, 128, 11008))
    yield Variant("linear m16", "linear_narrow", partial(_linear, 16))
    yield Variant("linear m1", "linear_narrow", partial(_linear, 1))
    yield Variant("linear m1 n1024", "linear_narrow", partial(_linear, 1, 1024))
    yield Variant("quantizer k4096", "quantize_rows", partial(_linear, 8192))
    yield Variant("quantizer k16384", "quantize_rows", partial(_linear, 8192, k=16384))
    yield Variant("quantizer and norm k4096", "normalize_and_quantize", partial(gpu_launches.norm, 4096))
    yield Variant("quantizer and rotary d128", "rotate_and_quantize", gpu_launches.rotary)
    for scheme, bits in (("W4A16", None), ("W4A8", 8)):
        yield Variant(f"{scheme} m1", "int4_narrow", partial(gpu_launches.int4, 1, bits))
        yield Variant(f"{scheme} m64", "int4_wide", partial(gpu_launches.int4, 64, bits))
    yield Variant("W4A8 m8192", "int4_wide", partial(gpu_launches.int4, 8192, 8))
    yield Variant("W4A16 m8192, weight", "int4_dequantize", partial(gpu_launches.int4, 8192, None))
    silu = partial(gpu_launches.int4, 8192, None, activation="silu")
    yield Variant("W4A16 m8192, epilogue", "finish_tiles", silu)
    for name, values in (("int8", torch.int8), ("bf16", BF16)):
        for m in (16, 8192):
            yield Variant(f"2:4 {name} m{m}", "two_four", partial(gpu_launches.two_four, m, values))
        yield Variant(f"16x16 {name} m512", "block_sparse", partial(gpu_launches.block_sparse, 512, (16, 16), values))
        one_token = partial(gpu_launches.block_sparse, 1, (16, 16), values)
        yield Variant(f"16x16 {name} m1", "block_sparse_narrow", one_token)
    floats = partial(gpu_launches.block_sparse, 512, (16, 16), BF16)
    yield Variant("16x16 bf16 m512 panels", "float_panels", floats)
    yield Variant("8x4 int4 m16", "int4_block_sparse", partial(gpu_launches.int4_sparse, 16))


VARIANTS = {v.name: v for v in _variants()}
