"""Our Triton kernels compiled ahead of time, for GPUs that are not there.

    with launches(80, handler):       # what the launchers would start goes to `handler`
        attention(q, k, v)

A `Launch` says which kernel, with which arguments; `compile_launch` compiles it for a target in another process
(`aot_worker`). Triton's own cache, in a directory of this user's below the system's temporary one, keeps the results.
"""

from __future__ import annotations

import atexit
import base64
import getpass
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
PACKAGE = "tcompress.kernels.triton"

Target = tuple[str, int | str, int]


def target(architecture: int | str) -> Target:
    """80 … for NVIDIA, "gfx942" … for AMD."""
    return ("cuda", architecture, 32) if isinstance(architecture, int) else ("hip", architecture, 64)


@dataclass(frozen=True)
class Launch:
    """module, kernel: where it is defined. grid: as given. args, kwargs: tensors, numbers, and Triton's options."""

    module: str
    kernel: str
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Compiled:
    """asm: ptx, or amdgcn, and the stages before. binary: cubin or hsaco. arguments: names of the parameters that are
    left, in order; behind them the code has two more for scratch memory. shared: bytes."""

    asm: dict[str, str]
    binary: dict[str, bytes]
    name: str
    warps: int
    warp_size: int
    shared: int
    scratch: int
    arguments: list[str]


class CompileError(Exception):
    """The message is the compiler's."""


class _Worker:
    """A process of `aot_worker`."""

    def __init__(self) -> None:
        cache = Path(tempfile.gettempdir()) / f"tcompress-aot-{getpass.getuser()}"
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        env["TRITON_CACHE_DIR"] = str(cache)
        # a tenth of the compiler's time; nothing here reads them
        env["TRITON_DISABLE_LINE_INFO"] = "1"
        # the package this process has, however it found it
        env["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "aot_worker.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.log, text=True, env=env,
        )  # fmt: skip

    def ask(self, line: str) -> str | None:
        """The answer, or None if the process ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline() or None

    def stop(self) -> str:
        """What it wrote to its error output."""
        self.process.kill()
        self.process.wait()
        self.log.seek(0)
        return self.log.read()


class _Pool:
    """Workers, one for each thread that asks at the same time, and what they answered."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._kept: dict[str, Compiled] = {}

    def ask(self, request: dict[str, Any]) -> Compiled:
        line = json.dumps(request)
        if line in self._kept:
            return self._kept[line]
        worker = self._idle.pop() if self._idle else _Worker()
        reply = worker.ask(line)
        if reply is None:
            raise CompileError(f"the compiler's process ended: {worker.stop()[-3000:]}")
        self._idle.append(worker)
        answer = json.loads(reply)
        if "error" in answer:
            raise CompileError(answer["error"])
        answer["binary"] = {k: base64.b64decode(v) for k, v in answer["binary"].items()}
        self._kept[line] = Compiled(**answer)
        return self._kept[line]

    def stop(self) -> None:
        for worker in self._idle:
            worker.stop()


_pool = _Pool()
atexit.register(_pool.stop)


def is_aligned(x: torch.Tensor) -> bool:
    """As on a GPU, where storages begin at multiples of 256."""
    return x.storage_offset() * x.element_size() % 16 == 0


def _described(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        return {"pointer": str(x.dtype).removeprefix("torch."), "aligned": is_aligned(x)}
    return x


def compile_launch(launch: Launch, architecture: int | str) -> Compiled:
    """Raises `CompileError`."""
    return _pool.ask(
        {
            "module": launch.module, "kernel": launch.kernel, "target": target(architecture),
            "args": [_described(x) for x in launch.args],
            "kwargs": {name: _described(x) for name, x in launch.kwargs.items()},
        }
    )  # fmt: skip


class _Kernel:
    """Takes the place of a kernel in its module."""

    def __init__(self, kernel: Any, handler: Callable[[Launch], None]) -> None:
        self.fn = kernel.fn
        self.handler = handler

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def start(*args: Any, **kwargs: Any) -> None:
            self.handler(Launch(self.fn.__module__, self.fn.__name__, tuple(grid), args, kwargs))

        return start


@contextmanager
def launches(capability: int, handler: Callable[[Launch], None]) -> Iterator[None]:
    """Within, the launchers of `kernels/triton` take the GPU for one of `capability` (`tiles.AMD` for AMD's), and
    `handler` gets what they launch."""
    import triton
    from triton.runtime.interpreter import InterpretedFunction

    replaced: list[tuple[Any, str, Any]] = []
    modules = [m for name, m in sys.modules.items() if name.startswith(PACKAGE + ".")]
    if not modules:
        raise RuntimeError("launches: import the launchers first")
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                new: Any = None
                if isinstance(value, triton.JITFunction | InterpretedFunction):
                    new = _Kernel(value, handler)
                elif name == "capability":
                    new = lambda x: capability  # noqa: E731
                if new is not None:
                    replaced.append((module, name, value))
                    setattr(module, name, new)
        yield
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
