"""A grid of blocks, one after another."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .decode import decode
from .errors import UnknownPtx
from .machine import Decoded, Machine
from .memory import Bytes, GlobalMemory
from .parse import parse
from .program import Parameter

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


@dataclass(frozen=True)
class Struct:
    """An argument that is a structure: arrays, `Buffer`s and numpy scalars, one after another as C lays them out."""

    fields: tuple[Any, ...]


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
    values: Sequence[int | float | bytes],
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared_bytes: int = 0,
    reverse: bool = False,
) -> int:
    """Runs all blocks on a memory that is laid out; the number of instructions (of a block, not of a thread).

    Args:
        values: an address, a number or a structure's bytes for each parameter.
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
    # whole 16 bytes, so that no aligned load of a parameter's last bytes reaches beyond
    given = np.zeros(-(-sum(p.offset + p.size for p in parameters[-1:]) // 16) * 16, np.uint8)
    for p, v in zip(parameters, values, strict=True):
        given[p.offset : p.offset + p.size] = _argument(p, v)
    memory.new_launch()
    count = 0
    numbers = range(grid[0] * grid[1] * grid[2])
    for number in reversed(numbers) if reverse else numbers:
        place = (number % grid[0], number // grid[0] % grid[1], number // (grid[0] * grid[1]))
        memory.new_block()
        machine = Machine(kernel, memory, given, place, grid, block, shared_bytes, number)
        machine.run()
        count += machine.executed
    return count


def _argument(p: Parameter, value: int | float | bytes) -> Bytes:
    if isinstance(value, bytes) or p.type is None:
        if p.type is not None or not isinstance(value, bytes) or len(value) != p.size:
            raise ValueError(f"launch: {p.name}: got {value!r}, expected {p.size} bytes of a structure")
        return np.frombuffer(value, np.uint8)
    if p.type.is_float:
        return np.array([value], p.type.dtype).view(np.uint8)
    bits = int(value)
    if bits != value or not -(1 << p.type.bits - 1) <= bits < 1 << p.type.bits:
        raise ValueError(f"launch: {p.name}: got {value}, expected .{p.type.name}")
    return np.array([bits & (1 << p.type.bits) - 1], p.type.raw).view(np.uint8)


class _Arguments:
    """Lays arrays out in global memory, once each."""

    def __init__(self) -> None:
        self.memory = GlobalMemory()
        self.places: dict[int, tuple[int, np.ndarray]] = {}

    def value(self, arg: Any) -> int | float | bytes:
        if isinstance(arg, Struct):
            return self._struct(arg)
        if not isinstance(arg, np.ndarray | Buffer):
            return arg
        buffer = arg if isinstance(arg, Buffer) else Buffer(arg)
        array = buffer.array
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise ValueError("run_ptx: args: an array is not contiguous or not writeable")
        if id(array) not in self.places:
            raw = array.reshape(-1).view(np.uint8)
            self.places[id(array)] = (self.memory.add(raw, None, buffer.written, buffer.misalign), array)
        return self.places[id(array)][0]

    def _struct(self, struct: Struct) -> bytes:
        out, largest = b"", 1
        for field in struct.fields:
            value = np.uint64(self.value(field)) if isinstance(field, np.ndarray | Buffer) else field
            if not isinstance(value, np.generic):
                raise ValueError(f"Struct: got {value!r}, expected an array or a numpy scalar, whose size is known")
            largest = max(largest, value.itemsize)
            out += bytes(-len(out) % value.itemsize) + value.tobytes()
        return out + bytes(-len(out) % largest)


def run_ptx(
    ptx_text: str,
    kernel_name: str | None,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    args: Sequence[int | float | np.ndarray | Buffer | Struct],
    shared_bytes: int = 0,
    reverse: bool = False,
) -> int:
    """Runs one kernel; arrays among its arguments are changed in place, as a GPU would change them.

    Args:
        ptx_text: a module. kernel_name: of an `.entry` in it (mangled, if from C++); None if there is one only.
        grid, block: x, y, z.
        args: one for each parameter: a number, a C-contiguous array, a `Buffer` or a `Struct` of those. The same array
            twice is one buffer.
        shared_bytes: of dynamic shared memory.
        reverse: the last block first.

    Returns:
        Number of instructions that were run, each by all threads of a block.

    Raises:
        UnknownPtx: a word that is not modelled. Another PtxError: a defect of the kernel.
    """
    arguments = _Arguments()
    values = [arguments.value(arg) for arg in args]
    memory = arguments.memory
    memory.freeze()
    count = launch(load(ptx_text, kernel_name), memory, values, grid, block, shared_bytes, reverse)
    for address, array in arguments.places.values():
        array.reshape(-1).view(np.uint8)[:] = memory.content(address, array.nbytes)
    return count
