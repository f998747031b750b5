"""What a model gave for each sample, kept until it is wanted: in memory, or in files."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested mappings, tuples and lists."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors_in(item)


def copied(value: Any) -> Any:
    """The same with nothing shared, which a block may write into; a key-value cache, for one, grows with each call."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(copied(item) for item in value)
    return {key: copied(item) for key, item in value.items()} if type(value) is dict else copy.deepcopy(value)


class Kept:
    """A list of nested tensors, by index. What is read is the reader's own: it may be written into.

    Args:
        folder: for a file each; None keeps them in memory. Who made it removes it.
        name: of the files.
    """

    def __init__(self, folder: Path | None, name: str) -> None:
        self._folder, self._name = folder, name
        self._held: dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._held)

    def __setitem__(self, index: int, value: Any) -> None:
        self._held[index] = value
        if self._folder is not None:
            # A view would be written with all that it is a part of.
            torch.save(copied(value), self._path(index))
            self._held[index] = None

    def __getitem__(self, index: int) -> Any:
        if self._folder is None or index not in self._held:
            return copied(self._held.get(index))
        # The file is this process's own, in a folder that only its user can write to.
        return torch.load(self._path(index), weights_only=False)

    def _path(self, index: int) -> Path:
        assert self._folder is not None
        return self._folder / f"{self._name}-{index}.pt"
