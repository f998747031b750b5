"""Defines an op with torch: schema, reference, fake and the error on backward, all in one place."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from tcompress import _extension, backend

_library = torch.library.Library("tcompress", "DEF")


@dataclass(frozen=True)
class Op:
    """All that the house knows about an op.

    Attributes:
        name: without the namespace `tcompress::`.
        schema: torch's function schema, without the name.
        reference: plain torch; defines the numbers. Takes the schema's arguments by position.
        fake: shapes and dtypes of the result, for `torch.compile`.
        tolerance: how many times the error of torch's own float32 computation a kernel's error against float64 may be;
            0 where the result is integers.
        flops: arithmetic operations for the given arguments.
        nbytes: bytes read and written once each for the given arguments.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    tolerance: float
    flops: Callable[..., int]
    nbytes: Callable[..., int]

    @property
    def mutates(self) -> bool:
        """Whether the op changes its arguments."""
        return "!" in self.schema


OPS: dict[str, Op] = {}


def define(op: Op) -> Op:
    """Registers `op` with torch's dispatcher. Kernels of compiled backends register themselves under their own key."""
    _library.define(op.name + op.schema)
    _library.impl(op.name, op.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"tcompress::{op.name}", op.fake, lib=_library)
    differentiates_not(op, "tcompress", _library)
    backend.register_reference(op.name, op.reference)
    OPS[op.name] = op
    return op


def differentiates_not(op: Op, namespace: str, library: torch.library.Library) -> None:
    """Registers the error on backward."""

    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(backend.no_backward(op.name))

    if not op.mutates:  # torch differentiates functional ops only
        torch.library.register_autograd(f"{namespace}::{op.name}", backward, lib=library)


def cpu_unsupported(x: torch.Tensor, *args: Any, **kwargs: Any) -> str | None:
    """The reasons that all CPU kernels share."""
    if _extension.C is None:
        return _extension.WHY_NOT
    if not x.is_cpu:
        return f"the input is on {x.device.type}"
    return None
