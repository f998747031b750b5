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
        bits: that a linear layer's weight takes, on average; 0 without linear layers.
        cpu_dtype: of all linear layers' weights, where it is one and they lie in the main memory; else None.
        calls: how often each (tokens, N, K) is multiplied in one call on the first batch; empty without data.
    """

    parameters: int
    linear: float
    embedding: float
    zeros: float
    bits: float
    cpu_dtype: torch.dtype | None
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
    bits = sum(8 * w.element_size() * w.numel() for w in weights.values())
    kinds = {(w.device.type, w.dtype) for w in weights.values()}
    cpu_dtype = next((dtype for device, dtype in kinds if device == "cpu"), None) if len(kinds) == 1 else None
    calls: Counter[Shape] = Counter()
    if batch is not None:
        with calibrate.evaluating(model), ExitStack() as stack:
            for m in linears:
                stack.callback(m.register_forward_pre_hook(_counted(calls), with_kwargs=True).remove)
            calibrate.run(model, batch)
    tied = sum(t.numel() for key, t in tables.items() if key not in weights)
    return Profile(
        parameters=total,
        linear=elements / max(total, 1),
        embedding=tied / max(total, 1),
        zeros=zeros / max(elements, 1),
        bits=bits / max(elements, 1),
        cpu_dtype=cpu_dtype,
        calls=dict(calls),
    )


def _counted(calls: Counter[Shape]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        n, k = linear_weight(module).shape
        calls[x.shape[:-1].numel(), n, k] += 1

    return hook


def kernel_seconds(
    calls: dict[Shape, int], schemes: Sequence[Scheme], seconds: float = 0.05, dtype: torch.dtype = torch.float32
) -> dict[str, float]:
    """Seconds that all linear layers of one call take on the CPU: torch's, under the name of the dtype, and by scheme.

    Args:
        calls: of `profile`.
        seconds: for which each shape is measured; weights are random.
        dtype: of the inputs, and of torch's weights: one that `QuantizedLinear` takes.
    """
    total = {name_of(dtype): 0.0} | {scheme.name: 0.0 for scheme in schemes}
    generator = torch.Generator("cpu").manual_seed(0)
    for (m, n, k), times in calls.items():
        linear = nn.Linear(k, n, device="cpu", dtype=dtype)
        x = torch.randn(m, k, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        layers: list[nn.Module] = [linear, *(QuantizedLinear.from_linear(linear, scheme) for scheme in schemes)]
        with torch.inference_mode():
            found = alternate([_call(layer, x) for layer in layers], seconds, warm_up=1, min_calls=3)
        for name, timing in zip(total, found, strict=True):
            total[name] += times * timing.median
    return total


def name_of(dtype: torch.dtype) -> str:
    """Such as "float32"."""
    return str(dtype).removeprefix("torch.")


def _call(layer: nn.Module, x: torch.Tensor) -> Any:
    return lambda: layer(x)
