"""Tensors that end at a page nobody may read, and processes that may die of it.

Triton's interpreter reads memory where a kernel points to, so an access behind such a tensor ends the process.`outcome`
runs a function in a forked one and says how that ended.
"""

from __future__ import annotations

import ctypes
import faulthandler
import mmap
import os
import signal
import sys
import traceback
from collections.abc import Callable

import torch

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_PROT_NONE = 0


def guarded(x: torch.Tensor, at_start: bool = False) -> torch.Tensor:
    """A contiguous copy of `x` that ends (or starts) at a protected page. The memory is never given back: tests are
    short, and a tensor that outlives it would be worse."""
    x = x.contiguous()
    page, size = mmap.PAGESIZE, x.nbytes
    room = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, room + 2 * page)
    _kept.append(memory)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for start in (address, address + page + room):
        if _libc.mprotect(start, page, _PROT_NONE):
            raise OSError(ctypes.get_errno(), "mprotect")
    if not size:
        return x
    where = page if at_start else page + room - size
    copy = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=where).view(x.shape)
    return copy.copy_(x)


_kept: list[mmap.mmap] = []


def outcome(function: Callable[[], object]) -> str:
    """Runs `function` in a forked process: "ok", "raised", or the name of the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            faulthandler.disable()  # its report of an expected end is noise
            # threads do not survive a fork, and torch would wait for its own
            torch.set_num_threads(1)
            function()
            code = 0
        except BaseException:  # the parent must not go on twice
            traceback.print_exc()
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return "raised" if os.WEXITSTATUS(status) else "ok"
