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

import torch
import triton
from tcompress.kernels.triton import attention, attention_tiles, attention_varlen, linear, linear_tiles
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ARCHITECTURES = (80, 89, 90)
HALF, INT8, FLOAT = torch.float16, torch.int8, torch.float32


@dataclass(frozen=True)
class Compiled:
    """One kernel of a launch: its name, machine code, and what the launch asks for. blocks: its BLOCK_… constants."""

    kernel: str
    cubin: bytes
    warps: int
    shared: int
    blocks: dict[str, int]


@dataclass(frozen=True)
class Variant:
    """A launch with certain arguments. `launch` is called with an architecture, 80, 89 or 90. `kernel`: the one that
    the variant is there for; the others of the launch are compiled too."""

    name: str
    kernel: str
    launch: Callable[[int], object]


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
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        warps, shared = kernel.metadata.num_warps, kernel.metadata.shared
        blocks = {name: value for name, value in options.items() if name.startswith("BLOCK_")}
        compiled.append(Compiled(self.__name__, kernel.asm["cubin"], warps, shared, blocks))
        return kernel

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(_AbsentGPU(architecture))  # it stays: what was before may be none
    try:
        yield compiled
    finally:
        JITFunction.run = run


def compile_variant(variant: Variant, architecture: int) -> list[Compiled]:
    """The kernels of the variant's launch, in order.

    Raises:
        RuntimeError: Triton interprets its kernels in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("compile_variant: TRITON_INTERPRET: got 1, expected a process without it")
    with _compile_launches(architecture) as compiled:
        variant.launch(architecture)
    return compiled


def _empty(*shape: int, dtype: torch.dtype = HALF) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _attend(
    architecture: int,
    d: int,
    s: int = 4096,
    causal: bool = False,
    mask: torch.dtype | None = None,
    lse: bool = False,
    value_bits: int = 16,
) -> object:
    q = _empty(1, 2, s, d)
    masks = None if mask is None else _empty(1, 2, s, s, dtype=mask)
    head = attention.attention_prepare.padded_head(d)
    tile = attention_tiles.tiles(architecture, head, s, mask is not None, value_bits)
    return attention.attention(q, q, q, masks, causal=causal, return_lse=lse, tile=tile, value_bits=value_bits)


def _attend_varlen(architecture: int, d: int, s: int = 4096, sequences: int = 1, causal: bool = True) -> object:
    q, offsets = _empty(s * sequences, 2, d), _empty(sequences + 1, dtype=torch.int64)
    tile = attention_tiles.tiles(architecture, d, s, False)
    return attention_varlen.attention_varlen(q, q, q, offsets, offsets, right=0 if causal else -1, tile=tile)


def _linear(
    architecture: int, m: int, n: int = 4096, k: int = 4096, bias: bool = True, activation: str = "none"
) -> object:
    choose = linear_tiles.narrow_tiles if m <= linear_tiles.NARROW_TOKENS else linear_tiles.wide_tiles
    x, weight = _empty(m, k, dtype=torch.bfloat16), _empty(n, k, dtype=INT8)
    biases = _empty(n, dtype=torch.bfloat16) if bias else None
    tile = choose(architecture, m, n, k)
    return linear.linear(x, weight, _empty(n, dtype=FLOAT), biases, activation=activation, tile=tile)


def _variants() -> Iterator[Variant]:
    for d in (64, 128, 256):
        for causal in (False, True):
            name = f"attention d{d}" + (" causal" if causal else "")
            yield Variant(name, "attend", partial(_attend, d=d, causal=causal))
    yield Variant("attention d64 short", "attend", partial(_attend, d=64, s=1024))
    yield Variant("attention d128 causal lse", "attend", partial(_attend, d=128, causal=True, lse=True))
    for d in (64, 128):
        for kind, mask in (("bool", torch.bool), ("float", HALF)):
            yield Variant(f"attention d{d} {kind} mask", "attend", partial(_attend, d=d, mask=mask))
    for d in (64, 128):
        for causal in (False, True):
            name = f"attention d{d} values in int8" + (" causal" if causal else "")
            yield Variant(name, "attend", partial(_attend, d=d, causal=causal, value_bits=8))
        yield Variant(f"attention d{d} varlen causal", "attend_varlen", partial(_attend_varlen, d=d))
    yield Variant("attention d128 lse", "quantize_queries_and_keys", partial(_attend, d=128, lse=True))
    yield Variant("attention d128 means", "key_sums", partial(_attend, d=128))
    yield Variant("linear m8192", "linear_wide", partial(_linear, m=8192))
    yield Variant("linear m8192 gelu", "linear_wide", partial(_linear, m=8192, activation="gelu"))
    yield Variant("linear m128", "linear_wide", partial(_linear, m=128))
    yield Variant("linear m128 n11008", "linear_wide", partial(_linear, m=128, n=11008))
    yield Variant("linear m16", "linear_narrow", partial(_linear, m=16))
    yield Variant("linear m1", "linear_narrow", partial(_linear, m=1))
    yield Variant("linear m1 n1024", "linear_narrow", partial(_linear, m=1, n=1024))
    yield Variant("quantizer k4096", "quantize_rows", partial(_linear, m=8192, k=4096))
    yield Variant("quantizer k16384", "quantize_rows", partial(_linear, m=8192, k=16384))


VARIANTS = {v.name: v for v in _variants()}
