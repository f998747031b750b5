"""What the files of bindings share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

Maybe = torch.Tensor | None


class Kernel(NamedTuple):
    """Of one op: functions of its arguments, one that runs it, and one that says why it cannot, or None; `path` says
    which way is taken, where `explain` should."""

    run: Callable[..., Any]
    unsupported: Callable[..., str | None]
    path: Callable[..., str | None] | None = None
