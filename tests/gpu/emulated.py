"""The launchers of `kernels/triton` on CPU tensors, their kernels compiled for a GPU and run in the PTX emulator.

    with emulated(80):
        out, _ = attention(q, k, v)

Each pointer may touch the elements of its tensor and nothing else; what `torch.empty` made holds no values until a
kernel writes them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
import ptx
import torch
from aot import Compiled, Launch, compile_launch, launches
from ptx.memory import POISON, GlobalMemory


def storage_bytes(x: torch.Tensor) -> np.ndarray:
    """All bytes of its storage, shared."""
    storage = x.untyped_storage()
    return torch.tensor([], dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),), (1,)).numpy()


def touched(x: torch.Tensor) -> np.ndarray:
    """Which bytes of its storage are the tensor's."""
    out = np.zeros(x.untyped_storage().nbytes(), bool)
    if x.numel() == 0:
        return out
    at = np.full(1, x.storage_offset(), np.int64)
    for size, stride in zip(x.shape, x.stride(), strict=True):
        if stride:
            at = (at[:, None] + np.arange(size) * stride).ravel()
    out[(at[:, None] * x.element_size() + np.arange(x.element_size())).ravel()] = True
    return out


class Emulator:
    """instructions: run so far, of a block each. launched: what was run. reverse: the last block first.

    edit: gets a kernel's name and PTX, gives the PTX to run: to plant a defect. reads_unwritten: kernels that may read
    memory which nothing wrote, for rows that they drop.
    """

    def __init__(
        self,
        architecture: int,
        reverse: bool = False,
        edit: Callable[[str, str], str] | None = None,
        reads_unwritten: Collection[str] = (),
    ) -> None:
        self.architecture = architecture
        self.reads_unwritten = reads_unwritten
        self.reverse = reverse
        self.edit = edit or (lambda name, text: text)
        self.instructions = 0
        self.launched: list[Launch] = []
        # storages that torch.empty made: which bytes have been written; the tensor keeps the storage alive
        self._state: dict[int, tuple[torch.Tensor, np.ndarray]] = {}

    def empty(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """torch.empty, without the values that it happens to have."""
        x = _empty(*args, **kwargs)
        storage_bytes(x)[:] = POISON
        self._state[x.untyped_storage().data_ptr()] = (x, np.zeros(x.untyped_storage().nbytes(), bool))
        return x

    def run(self, launch: Launch) -> None:
        compiled = compile_launch(launch, self.architecture)
        if compiled.scratch:
            raise NotImplementedError(f"{launch.kernel}: scratch memory of {compiled.scratch} bytes")
        arguments = self._arguments(launch, compiled)
        tensors = {id(x): x for x in arguments if isinstance(x, torch.Tensor)}
        storages: dict[int, list[torch.Tensor]] = {}
        for x in tensors.values():
            storages.setdefault(x.untyped_storage().data_ptr(), []).append(x)
        space = GlobalMemory()
        base: dict[int, int] = {}
        for key, views in storages.items():
            valid = np.logical_or.reduce([touched(x) for x in views])
            kept = self._state.get(key)
            base[key] = space.add(storage_bytes(views[0]), valid, True if kept is None else kept[1])
        space.freeze()
        if launch.kernel in self.reads_unwritten:
            space.allow_unwritten()
        values: list[Any] = [
            base[x.untyped_storage().data_ptr()] + x.storage_offset() * x.element_size()
            if isinstance(x, torch.Tensor)
            else x
            for x in arguments
        ]
        grid = (*launch.grid, 1, 1)[:3]
        kernel = ptx.load(self.edit(launch.kernel, compiled.asm["ptx"]), compiled.name)
        block = (32 * compiled.warps, 1, 1)
        # the last two parameters point to scratch memory, of which there is none
        self.instructions += ptx.launch(
            kernel, space, [*values, 0, 0], (grid[0], grid[1], grid[2]), block, compiled.shared, self.reverse
        )
        self.launched.append(launch)
        for key, views in storages.items():
            content = storage_bytes(views[0])
            content[:] = space.content(base[key], content.size)
            if key in self._state:
                self._state[key][1][:] = space.written(base[key], content.size)

    @staticmethod
    def _arguments(launch: Launch, compiled: Compiled) -> list[Any]:
        """In the order of the compiled parameters."""
        kernel = getattr(importlib.import_module(launch.module), launch.kernel)
        names = kernel.fn.__code__.co_varnames[: kernel.fn.__code__.co_argcount]
        given = dict(zip(names, launch.args, strict=False)) | launch.kwargs
        return [given[name] for name in compiled.arguments]


_empty = torch.empty


@contextmanager
def emulated(
    architecture: int,
    reverse: bool = False,
    edit: Callable[[str, str], str] | None = None,
    reads_unwritten: Collection[str] = (),
) -> Iterator[Emulator]:
    """Within, the launchers' kernels run in the emulator, as compiled for `architecture` (80, 86, 89, 90 or 120)."""
    emulator = Emulator(architecture, reverse, edit, reads_unwritten)
    with launches(architecture, emulator.run), mock.patch("torch.empty", emulator.empty):
        yield emulator
