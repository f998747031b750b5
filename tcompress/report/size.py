"""Bytes of a model: what a checkpoint takes and what stays in memory."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn


class Sizes(BaseModel):
    """Bytes, each tensor counted once however often it is used.

    Attributes:
        disk: the tensors of the state dict.
        resident: all parameters and buffers, the derived kernel layouts included.
    """

    model_config = ConfigDict(frozen=True)
    disk: int
    resident: int


def model_sizes(model: nn.Module) -> Sizes:
    """Measures a module."""
    resident = [*model.parameters(), *model.buffers()]
    return Sizes(disk=_unique_bytes(model.state_dict().values()), resident=_unique_bytes(resident))


def _unique_bytes(tensors: Iterable[object]) -> int:
    # By address, shape and strides: state_dict() wraps a tied tensor in a new object for each of its names.
    seen: dict[tuple[object, ...], int] = {}
    for t in tensors:
        if isinstance(t, torch.Tensor) and t.numel():
            seen[(t.data_ptr() or id(t), t.shape, t.stride())] = t.nbytes
    return sum(seen.values())
