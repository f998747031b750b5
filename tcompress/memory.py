"""Bytes: what nested tensors take, and what the C library keeps of memory that was given back."""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from tcompress.activations import tensors_in
from tcompress.errors import message

_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(value: int | float | str, argument: str) -> int:
    """A number of bytes, given as one or as "700 MB", "1.5GiB".

    Raises:
        ValueError: it is none, or not positive; the message begins with "compress: " and the argument's name.
    """
    expected = 'a positive number of bytes, or text such as "700 MB" or "1.5 GiB"'
    number = value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]+\.?[0-9]*)\s*([a-z]*)\s*", value.lower())
        if found is None or found[2] not in _UNITS:
            raise ValueError(message("compress", argument, repr(value), expected))
        number = float(found[1]) * _UNITS[found[2]]
    if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number < float("inf"):
        raise ValueError(message("compress", argument, repr(value), expected))
    return int(number)


def in_units(nbytes: float) -> str:
    """Bytes in words: "12.3 MB"."""
    for unit in ("GB", "MB", "kB"):
        size = _UNITS[unit.lower()]
        if nbytes >= size:
            return f"{nbytes / size:.{1 if nbytes < 100 * size else 0}f} {unit}"
    return f"{nbytes:.0f} B"


def nbytes_of(value: Any) -> int:
    """Bytes of all tensors in nested mappings, tuples and lists."""
    return sum(tensor.nbytes for tensor in tensors_in(value))


def _found_trim() -> Callable[[int], int] | None:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


_TRIM = _found_trim()


@contextmanager
def trimmed_between_blocks(model: nn.Module) -> Iterator[None]:
    """Trims after each member of a `torch.nn.ModuleList` that is called: a model's own forward leaves gaps too."""
    with ExitStack() as stack:
        for blocks in (module for module in model.modules() if isinstance(module, nn.ModuleList)):
            for block in blocks if _TRIM is not None else ():
                stack.callback(block.register_forward_hook(lambda *_: trim()).remove)
        yield


def trim() -> None:
    """Gives memory that is free back to the system, where the C library has a function for that (glibc).

    glibc keeps freed pieces of up to 32 MiB for later. Matrices of many sizes leave so many gaps between what stays
    that a process held twice what lives.
    """
    if _TRIM is not None:
        _TRIM(0)
