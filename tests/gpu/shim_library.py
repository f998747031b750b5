"""The kernels of csrc/cuda compiled by g++ with the emulation in tests/gpu/shim, behind functions on CPU tensors.

Also a program: `python shim_library.py LIBRARY CASE …` runs cases of `shim_cases` on a library built under the address
sanitizer, which wants a process of its own.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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

    def pad_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """int8 [N, K] to rows of a multiple of 16 bytes."""
        n, k = weight.shape
        out = Guarded((n, -(-k // 16) * 16), torch.int8)
        self.call("pad_rows", weight, n, k, out.tensor, out.tensor.shape[1])
        return out.check()
