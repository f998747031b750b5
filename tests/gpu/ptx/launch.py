"""A grid of blocks, one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .decode import decode
from .errors import UnknownPtx
from .machine import Decoded, Machine
from .memory import Bytes, GlobalMemory
from .parse import parse

#: Most shared memory of a block, in bytes: of 9.0, the largest of what is modelled.
MOST_SHARED = 227 * 1024
MOST_THREADS = 1024

_decoded: dict[tuple[str, str], Decoded] = {}


@dataclass(frozen=True)
class Buffer:
    """An argument that is a pointer: the array that it points to the start of.

    written: False for one whose contents the kernel must not read before it writes them. misalign: bytes by which its
    address misses a multiple of 256.
    """

    array: np.ndarray
    written: bool = True
    misalign: int = 0


def load(ptx_text: str, kernel_name: str | None = None) -> Decoded:
    """The kernel of that name, or the only one, ready to run. Kept for the next time."""
    key = (hashlib.sha256(ptx_text.encode()).hexdigest(), kernel_name or "")
    if key not in _decoded:
        kernels = parse(ptx_text)
        if kernel_name is None and len(kernels) != 1:
            raise UnknownPtx(f"kernel_name: the text has {', '.join(kernels)}; name one")
        if kernel_name is not None and kernel_name not in kernels:
            raise UnknownPtx(f"kernel_name: got {kernel_name}, the text has {', '.join(kernels)}")
        _decoded[key] = decode(kernels[kernel_name] if kernel_name else next(iter(kernels.values())))
    return _decoded[key]


def launch(
    kernel: Decoded,
    memory: GlobalMemory,
    values: Sequence[int | float],
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int = 0,
    reverse: bool = False,
) -> int:
    """Runs all blocks on a memory that is laid out; the number of instructions (of a block, not of a thread).

    Args:
        values: an address or a number for each parameter.
        shared_bytes: of dynamic shared memory.
        reverse: the last block first. No result may depend on it.
    """
    parameters = kernel.kernel.parameters
    if len(values) != len(parameters):
        raise ValueError(f"launch: values: got {len(values)}, expected {len(parameters)}")
    if int(np.prod(block)) > MOST_THREADS or kernel.kernel.dynamic + shared_bytes > MOST_SHARED:
        raise ValueError(
            f"launch: got {block} threads and {shared_bytes} bytes, expected at most {MOST_THREADS} and {MOST_SHARED}"
        )
    arguments: dict[str, np.generic] = {}
    for p, v in zip(parameters, values, strict=True):
        if p.type.is_float:
            arguments[p.name] = p.type.dtype.type(v)
        else:
            bits = int(v)
            if bits != v or not -(1 << p.type.bits - 1) <= bits < 1 << p.type.bits:
                raise ValueError(f"launch: {p.name}: got {v}, expected .{p.type.name}")
            arguments[p.name] = p.type.raw.type(bits & (1 << p.type.bits) - 1)
    memory.new_launch()
    count = 0
    numbers = range(grid[0] * grid[1] * grid[2])
    for number in reversed(numbers) if reverse else numbers:
        place = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        machine = Machine(kernel, memory, arguments, place, grid, block, shared_bytes, number)
        machine.run()
        count += machine.executed
    return count


def run_ptx(
    ptx_text: str,
    kernel_name: str | None,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[int | float | np.ndarray | Buffer],
    shared_bytes: int = 0,
    reverse: bool = False,
) -> int:
    """Runs one kernel; arrays among its arguments are changed in place, as a GPU would change them.

    Args:
        ptx_text: a module. kernel_name: of an `.entry` in it (mangled, if from C++); None if there is one only.
        grid, block: x, y, z.
        args: one for each parameter: a number, a C-contiguous array, or a `Buffer`. The same array twice is one buffer.
        shared_bytes: of dynamic shared memory.
        reverse: the last block first.

    Returns:
        Number of instructions that were run, each by all threads of a block.

    Raises:
        UnknownPtx: a word that is not modelled. Another PtxError: a defect of the kernel.
    """
    memory = GlobalMemory()
    places: dict[int, tuple[int, np.ndarray]] = {}
    values: list[int | float] = []
    for arg in args:
        buffer = Buffer(arg) if isinstance(arg, np.ndarray) else arg
        if not isinstance(buffer, Buffer):
            values.append(buffer)
            continue
        array = buffer.array
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError("run_ptx: args: an array is not contiguous or not writeable")
        if id(array) not in places:
            places[id(array)] = (memory.add(_bytes(array), None, buffer.written, buffer.misalign), array)
        values.append(places[id(array)][0])
    memory.freeze()
    count = launch(load(ptx_text, kernel_name), memory, values, grid, block, shared_bytes, reverse)
    for address, array in places.values():
        array.reshape(-1).view(np.uint8)[:] = memory.content(address, array.nbytes)
    return count


def _bytes(array: np.ndarray) -> Bytes:
    return array.reshape(-1).view(np.uint8)
