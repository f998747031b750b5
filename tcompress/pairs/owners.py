"""Notices parameters that are used while the module that holds them does not run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


class Owners:
    """Watches modules during a run.

    Attributes:
        running: the watched modules that are being called, the innermost last; kept by whoever runs the model.
        elsewhere: those whose parameter was an operand while none of the modules that hold it was called, as in
            `F.linear(x, embedding.weight)`.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.running: list[nn.Module] = []
        self.elsewhere: set[nn.Module] = set()
        self._of: dict[int, list[nn.Module]] = {}
        for module in modules:
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._of.setdefault(id(parameter), []).append(module)

    def see(self, operands: Iterable[Any]) -> None:
        """Takes note of an operation's operands."""
        for operand in operands:
            owners = self._of.get(id(operand))
            if owners is not None and not any(module in self.running for module in owners):
                self.elsewhere.update(owners)
