"""What all peers of an op get, and how their results are judged."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, Protocol, TypeVar

import torch


class Shape(Protocol):
    """`str` gives its name with its sizes."""

    @property
    def macs(self) -> int:
        """Multiply-adds of a call."""


S = TypeVar("S", bound=Shape)


class Problem(ABC, Generic[S]):
    """Inputs for a shape, and the error of a result."""

    @abstractmethod
    def inputs(self, shape: S) -> tuple[Any, ...]:
        """What the factories of the peers get: float32 tensors, always the same ones."""

    @abstractmethod
    def expected(self, *inputs: Any) -> torch.Tensor:
        """The result in float64."""

    @abstractmethod
    def errors(self, got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
        """Fields of a `Result`: relative_error, which the peer's tolerance bounds, and maybe cosine."""
