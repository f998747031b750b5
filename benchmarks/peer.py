"""What is compared: a peer, one line of a table, and why it may not run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: Computes once, on the inputs it was made with.
Call = Callable[[], torch.Tensor]


class CannotRun(Exception):
    """Why a peer does not run here: a missing package, another processor, a shape it does not take."""


@dataclass(frozen=True)
class Peer:
    """One line of a table.

    Attributes:
        factory: takes the inputs of a `Problem`, returns the call that is timed.
        bits: of a stored element of what `read_bytes` counts, without scales.
        tolerance: largest error against float64 that the result may have.
    """

    factory: Callable[..., Call]
    bits: int
    tolerance: float

    def build(self, *inputs: Any) -> Call:
        """The call on the given inputs.

        Raises:
            CannotRun: with the reason.
        """
        try:
            return self.factory(*inputs)
        except ModuleNotFoundError as error:
            raise CannotRun(f"the package {error.name} is not installed") from error

    def read_bytes(self, shape: Any) -> int:
        """Bytes that every call reads at least once: of the packed weight, or of K and V."""
        raise NotImplementedError
