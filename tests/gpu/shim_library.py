"""The kernels of csrc/cuda compiled by g++ with the emulation in tests/gpu/shim, behind functions on CPU tensors."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
SHIM = HERE / "shim"
CUDA = HERE.parent.parent / "csrc" / "cuda"
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-shared", "-ffp-contract=off", "-w", "-DTCOMPRESS_CUDA_ON_CPU"]

#: In the order of the enumerations in shim/fibers.h, csrc/cpu/dtype.h and csrc/cpu/activation_kind.h.
ORDERS = ("forward", "reverse", "random", "warp greedy")
BUGS = ("none", "missing barrier", "unwaited copy", "off by one", "wrong mask")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int32)
ACTIVATIONS = ("none", "relu", "gelu", "gelu_tanh", "silu")
TILES = ("auto", "wide", "middle", "narrow")
GUARD = 64


class EmulationError(RuntimeError):
    """The emulated kernel did what a GPU would not: a deadlock, an address outside shared memory, …"""


def compiler() -> str | None:
    return shutil.which("g++")


def build(folder: Path, *flags: str) -> Path:
    """Compiles the library, one object a source; kept in the user's temporary folder until a source changes."""
    sources = sorted(SHIM.glob("*.cpp"))
    inputs = [*SHIM.iterdir(), *CUDA.iterdir(), *(CUDA.parent / "cpu").glob("*_kind.h")]
    text = b"".join(p.read_bytes() for p in sorted(inputs)) + " ".join([*FLAGS, *flags]).encode()
    target = folder / f"kernels_on_cpu_{hashlib.sha256(text).hexdigest()[:16]}.so"
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a second process waits for the first one's
        if not target.exists():
            part = target.with_suffix(f".{os.getpid()}")
            gxx = compiler()
            assert gxx
            command = [gxx, *FLAGS, *flags, "-I", str(SHIM), "-I", str(CUDA), *map(str, sources), "-o", str(part)]
            subprocess.run(command, check=True)
            part.replace(target)
    return target


def cache_folder() -> Path:
    folder = Path(tempfile.gettempdir()) / f"tcompress-shim-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    return folder


@cache
def library() -> Library:
    return Library(build(cache_folder()))


def pointer(t: torch.Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


class Guarded:
    """An output between guard bands, which must stay as they are."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        count = 1
        for s in shape:
            count *= s
        bytes_per = torch.empty((), dtype=dtype).element_size()
        self._all = torch.full((count * bytes_per + 2 * GUARD,), 0x5A, dtype=torch.uint8)
        self.tensor = self._all[GUARD : GUARD + count * bytes_per].view(dtype).view(*shape)

    def check(self) -> torch.Tensor:
        if not ((self._all[:GUARD] == 0x5A).all() and (self._all[-GUARD:] == 0x5A).all()):
            raise EmulationError("wrote outside the output")
        return self.tensor.clone()


@dataclass(frozen=True)
class Attention:
    """Results, and what the kernels before left in the workspace."""

    out: torch.Tensor
    lse: torch.Tensor
    workspace: torch.Tensor
    offsets: list[int]
    heads: tuple[int, int, int]

    def _part(self, index: int, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        count = math.prod(shape) * torch.empty((), dtype=dtype).element_size()
        return self.workspace[self.offsets[index] :][:count].view(dtype).view(*shape)

    def queries(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers [B, H, Sqp, D] and scales [B, H, Sqp], padded."""
        b, h, _ = self.heads
        sqp, d = self.offsets[0], self.offsets[8]
        return self._part(2, torch.int8, b, h, sqp, d), self._part(4, torch.float32, b, h, sqp)

    def keys(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Integers [B, Hkv, Skp, D], scales [B, Hkv, Skp / 64] and mean [B, Hkv, D], padded."""
        b, _, h = self.heads
        skp, d = self.offsets[1], self.offsets[8]
        integers = self._part(3, torch.int8, b, h, skp, d)
        return integers, self._part(6, torch.float32, b, h, skp // 64), self._part(7, torch.float32, b, h, d)


class Library:
    """Functions of one compiled library; `order` and `planted` hold until they are set again."""

    def __init__(self, path: Path | str) -> None:
        self._c = ctypes.CDLL(str(path))
        self._c.shim_error.restype = ctypes.c_char_p
        self.order, self.planted = "forward", "none"

    @contextmanager
    def plant(self, bug: str) -> Iterator[None]:
        self.planted = bug
        try:
            yield
        finally:
            self.planted = "none"

    def call(self, name: str, *args: Any) -> None:
        """Tensors and None go as pointers, integers as int64 (a callee's int takes the low half)."""
        order, bug = ORDERS.index(self.order), BUGS.index(self.planted)
        self._c.shim_configure(ctypes.c_int(order), ctypes.c_uint64(7), ctypes.c_int(bug))
        tensor_or_none = (torch.Tensor, type(None))
        values = [
            pointer(a)
            if isinstance(a, tensor_or_none)
            else ctypes.c_float(a)
            if isinstance(a, float)
            else ctypes.c_int64(int(a))
            for a in args
        ]
        if getattr(self._c, f"shim_{name}")(*values):
            raise EmulationError(self._c.shim_error().decode())

    def quantize_per_token(
        self, x: torch.Tensor, bits: int = 8, symmetric: bool = True, centred: bool = False, ldq: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        m, k = x.shape
        ldq = k if ldq is None else ldq
        q = Guarded((m, ldq), torch.int8 if symmetric or centred else torch.uint8)
        scale, zero_point = Guarded((m, 1), torch.float32), Guarded((m, 1), torch.int32)
        self.call(
            "quantize_per_token", x, DTYPES.index(x.dtype), m, k, bits, symmetric, centred,
            q.tensor, ldq, scale.tensor, zero_point.tensor,
        )  # fmt: skip
        return q.check(), scale.check(), zero_point.check()

    def int8_linear(
        self,
        a: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        weight_scale: torch.Tensor,
        k: int,
        zero_point: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        out_dtype: torch.dtype = torch.float32,
        tile: str = "auto",
        multiprocessors: int = 4,
    ) -> torch.Tensor:
        """a [M, lda] and weight [N, ldw] of int8, rows at multiples of 16 bytes."""
        m, n = a.shape[0], weight.shape[0]
        sums = None
        if zero_point is not None:
            sums = torch.empty(n, dtype=torch.int32)
            self.call("row_sums", weight, n, k, weight.shape[1], sums)
        y = Guarded((m, n), out_dtype)
        self.call(
            "int8_linear", a, weight, scale, weight_scale, zero_point, sums, bias, residual, y.tensor,
            m, n, k, a.shape[1], weight.shape[1], DTYPES.index(out_dtype), ACTIVATIONS.index(activation),
            multiprocessors, TILES.index(tile),
        )  # fmt: skip
        return y.check()

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
        causal: bool = False,
        bottom_right: bool = False,
        left: int = -1,
        right: int = -1,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> Attention:
        """As the binding does it; q, k, v [B, H, S, D], the mask of shape [B, H, Sq, Skv]."""
        b, h, sq, d = q.shape
        kv_heads, skv, dv = k.shape[1], k.shape[2], v.shape[3]
        shape = torch.tensor([b, h, kv_heads, sq, skv, d, dv])
        strides = torch.tensor(
            [s for t in (q, k, v) for s in t.stride()[:3]] + list(mask.stride() if mask is not None else (0,) * 4)
        )
        v_dtype = torch.float16 if v.dtype == torch.float16 else torch.bfloat16
        if v.dtype == torch.float32 or dv % 8 or any(s % 8 for s in v.stride()[:3]) or v.data_ptr() % 16:
            width = -(-dv // 8) * 8
            padded = Guarded((b, kv_heads, skv, width), v_dtype)
            self.call(
                "pad_values", v, DTYPES.index(v.dtype), shape, strides, padded.tensor, DTYPES.index(v_dtype), width
            )
            v = padded.check()
            strides[6:9] = torch.tensor(v.stride()[:3])
        offsets = torch.zeros(9, dtype=torch.int64)
        self._c.shim_attention_workspace.restype = ctypes.c_int64
        size = self._c.shim_attention_workspace(pointer(shape), pointer(offsets))
        workspace = torch.full((size + 16,), 0x77, dtype=torch.uint8)
        workspace = workspace[-workspace.data_ptr() % 16 :][:size]
        out, lse = Guarded((b, sq, h, dv), q.dtype), Guarded((b, h, sq), torch.float32)
        boolean = mask is not None and mask.dtype == torch.bool
        mask_type = 0 if mask is None or boolean else DTYPES.index(mask.dtype)
        self.call(
            "attention", q, k, v, mask, boolean, mask_type, DTYPES.index(q.dtype), DTYPES.index(v_dtype),
            shape, strides, skv - sq if bottom_right else 0, left, 0 if causal else right,
            float(d**-0.5 if scale is None else scale), float(softcap), out.tensor, lse.tensor, workspace,
        )  # fmt: skip
        return Attention(out.check().transpose(1, 2), lse.check(), workspace, offsets.tolist(), (b, h, kv_heads))

    def int4_pack(
        self, weight: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, k: int, group: int
    ) -> torch.Tensor:
        """The kernel's weight, bytes."""
        n = weight.shape[0]
        self._c.shim_int4_bytes.restype = ctypes.c_int64
        size = self._c.shim_int4_bytes(*(ctypes.c_int64(i) for i in (n, k, group)))
        packed = Guarded((size,), torch.uint8)
        self.call("int4_pack", weight, scale, DTYPES.index(scale.dtype), zero_point, n, k, group, packed.tensor)
        return packed.check()

    def gate(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """y · gate, in the type of y; both contiguous."""
        out = Guarded(y.shape, y.dtype)
        out.tensor.copy_(y)
        self.call("gate", out.tensor, DTYPES.index(y.dtype), gate, y.numel())
        return out.check()

    def int4_linear(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor,
        zero_point: torch.Tensor | None,
        group: int,
        bias: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        activation: str = "none",
        out_dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """x [M, K] of 16 bits, the weight as `pack_int4` stores it: packed for the kernel, then multiplied."""
        (m, k), n = x.shape, weight.shape[0]
        packed = self.int4_pack(weight, scale, zero_point, k, group)
        x = torch.nn.functional.pad(x, (0, -k % 8)).contiguous()
        y = Guarded((m, n), out_dtype)
        self.call(
            "int4_linear", x, DTYPES.index(x.dtype), packed, bias, residual, y.tensor, m, n, k, x.shape[1],
            group, DTYPES.index(out_dtype), ACTIVATIONS.index(activation),
        )  # fmt: skip
        return y.check()

    def two_four_linear(
        self,
        a: torch.Tensor,
        values: torch.Tensor,
        index: torch.Tensor,
        scale: torch.Tensor,
        weight_scale: torch.Tensor,
        k: int,
        bias: torch.Tensor | None = None,
        activation: str = "none",
        out_dtype: torch.dtype = torch.float32,
        multiprocessors: int = 4,
    ) -> torch.Tensor:
        """a [M, lda] of int8 and the 2:4 weight as `pack_n_m` stores it: packed for the kernel, then multiplied."""
        m, n = a.shape[0], weight_scale.shape[0]
        packed = self.two_four_pack(values, index, n, k)
        y = Guarded((m, n), out_dtype)
        self.call(
            "two_four_linear", a, packed, scale, weight_scale, bias, y.tensor, m, n, k, a.shape[1],
            DTYPES.index(out_dtype), ACTIVATIONS.index(activation), multiprocessors,
        )  # fmt: skip
        return y.check()

    def two_four_pack(self, values: torch.Tensor, index: torch.Tensor, n: int, k: int) -> torch.Tensor:
        """The 2:4 weight [N, K] as `pack_n_m` stores it, packed for the kernel: uint8."""
        self._c.shim_two_four_bytes.restype = ctypes.c_int64
        size = self._c.shim_two_four_bytes(ctypes.c_int64(n), ctypes.c_int64(k))
        packed = Guarded((size,), torch.uint8)
        self.call("two_four_pack", values, index, n, k, packed.tensor)
        return packed.check()

    def pad_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """int8 [N, K] to rows of a multiple of 16 bytes."""
        n, k = weight.shape
        out = Guarded((n, -(-k // 16) * 16), torch.int8)
        self.call("pad_rows", weight, n, k, out.tensor, out.tensor.shape[1])
        return out.check()


def caught(library: Library, run: Callable[[], bool]) -> bool:
    """Whether some order shows that `run` is wrong, by its result or by what the emulation refuses."""
    for order in ORDERS:
        library.order = order
        try:
            if not run():
                return True
        except EmulationError:
            return True
    return False
