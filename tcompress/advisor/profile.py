"""What a model consists of, and how fast this machine's kernels run its linear layers under each scheme."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcompress import calibrate
from tcompress.nn import QuantizedLinear
from tcompress.quantize.scheme import Scheme
from tcompress.timing import alternate
from tcompress.weights import is_conv1d, linear_weight

#: (tokens, out_features, in_features)
Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Profile:
    """A model in numbers.

    Attributes:
        parameters: how many, each counted once.
        linear, embedding: which part of them lies in linear layers and in embeddings.
        zeros: which part of the linear layers' weights is zero.
        calls: how often each (tokens, N, K) is multiplied in one call on the first batch; empty without data.
    """

    parameters: int
    linear: float
    embedding: float
    zeros: float
    calls: dict[Shape, int]

    @property
    def tokens(self) -> int | None:
        """Of the linear layers' calls, the median; None without data."""
        ordered = sorted(m for (m, _, _), n in self.calls.items() for _ in range(n))
        return ordered[len(ordered) // 2] if ordered else None


def profile(model: nn.Module, batch: Any) -> Profile:
    """Counts a model's parameters and, where there is a batch, what its linear layers are called with."""
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) or is_conv1d(m)]
    weights = {id(m.weight): linear_weight(m).detach() for m in linears}
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    total = sum(p.numel() for p in model.parameters())
    elements = sum(w.numel() for w in weights.values())
    zeros = sum(int((w == 0).sum()) for w in weights.values())
    calls: Counter[Shape] = Counter()
    if batch is not None:
        with calibrate.evaluating(model), ExitStack() as stack:
            for m in linears:
                stack.callback(m.register_forward_pre_hook(_counted(calls), with_kwargs=True).remove)
            calibrate.run(model, batch)
    tied = sum(t.numel() for key, t in tables.items() if key not in weights)
    return Profile(total, elements / max(total, 1), tied / max(total, 1), zeros / max(elements, 1), dict(calls))


def _counted(calls: Counter[Shape]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        n, k = linear_weight(module).shape
        calls[x.shape[:-1].numel(), n, k] += 1

    return hook


def kernel_seconds(calls: dict[Shape, int], schemes: Sequence[Scheme], seconds: float = 0.05) -> dict[str, float]:
    """Seconds that all linear layers of one call take: "float32", torch's, and by each scheme's name, measured.

    Args:
        calls: of `profile`.
        seconds: for which each shape is measured; weights are random.
    """
    total = {"float32": 0.0} | {scheme.name: 0.0 for scheme in schemes}
    generator = torch.Generator("cpu").manual_seed(0)
    for (m, n, k), times in calls.items():
        linear = nn.Linear(k, n, device="cpu", dtype=torch.float32)
        x = torch.randn(m, k, generator=generator, dtype=torch.float32, device="cpu")
        layers: list[nn.Module] = [linear, *(QuantizedLinear.from_linear(linear, scheme) for scheme in schemes)]
        with torch.inference_mode():
            found = alternate([_call(layer, x) for layer in layers], seconds, warm_up=1, min_calls=3)
        for name, timing in zip(total, found, strict=True):
            total[name] += times * timing.median
    return total


def _call(layer: nn.Module, x: torch.Tensor) -> Any:
    return lambda: layer(x)
