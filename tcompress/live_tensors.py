"""How many bytes of tensors are alive at most while something runs, whatever allocates them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tcompress.activations import tensors_in


class LiveTensors(TorchDispatchMode):
    """Counts, while it is entered, the storages of tensors that operations return, each from its first to its last use.

    Other tensors that were there before count nothing, and neither does what an operation takes for itself meanwhile.

    Args:
        counted: tensors that are there already and count until they go.

    Attributes:
        now: bytes that are alive.
        peak: the most so far; it may be set back to `now`.
    """

    def __init__(self, counted: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        for tensor in counted:
            self._know(tensor.untyped_storage(), tensor.untyped_storage().nbytes())

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        for tensor in tensors_in((args, kwargs or {})):
            self._know(tensor.untyped_storage(), 0)
        output = func(*args, **(kwargs or {}))
        for tensor in tensors_in(output):
            storage = tensor.untyped_storage()
            self._know(storage, storage.nbytes())
        return output

    def _know(self, storage: torch.UntypedStorage, nbytes: int) -> None:
        address = storage._cdata
        if address in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[address]
            self.now -= nbytes

        self._known[address] = weakref.ref(storage, gone)
        self.now += nbytes
        self.peak = max(self.peak, self.now)
