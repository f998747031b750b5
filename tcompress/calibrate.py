"""Runs a model on the user's data and compares each layer with its replacement, in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tcompress.errors import message


def batches(data: Any) -> Iterator[Any]:
    """The batches in `data`: a tensor, a mapping or a tuple is one batch; any other iterable yields them.

    Raises:
        TypeError: not iterable. ValueError: empty.
    """
    if isinstance(data, torch.Tensor | Mapping | tuple):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, str):
        expected = "a tensor, a mapping, a tuple or an iterable of these"
        raise TypeError(message("compress", "data", type(data).__name__, expected))
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise ValueError(message("compress", "data", "no batches", "at least one"))


def run(model: nn.Module, batch: Any) -> Any:
    """Calls the model: a mapping as keywords, a tuple or list as positional arguments, a tensor as the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def first_tensor(output: Any) -> torch.Tensor | None:
    """The first float tensor in a model's output, which may be a tensor, a mapping, a tuple or a list."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = output.values()
    elif isinstance(output, tuple | list):
        values = output
    for value in values:
        found = first_tensor(value)
        if found is not None:
            return found
    return None


def sqnr_db(signal: float, noise: float) -> float:
    """Signal-to-quantization-noise ratio in decibels, from two sums of squares."""
    if not math.isfinite(noise) or not math.isfinite(signal):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


class OutputError:
    """Sums the squares of a layer's output and of the replacement's deviation from it."""

    def __init__(self, replacement: nn.Module) -> None:
        self.replacement = replacement
        self.signal = self.noise = 0.0
        self.calls = 0

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        expected, got = output.double(), self.replacement(*args, **kwargs).double()
        self.signal += float(expected.square().sum())
        self.noise += float((got - expected).square().sum())
        self.calls += 1

    @property
    def sqnr_db(self) -> float | None:
        """None if the layer was never called."""
        return sqnr_db(self.signal, self.noise) if self.calls else None


def compare_outputs(
    model: nn.Module, replacements: dict[nn.Module, nn.Module], data: Any
) -> tuple[dict[nn.Module, OutputError], Any, torch.Tensor | None]:
    """Runs `model` on `data` and feeds each replaced layer's inputs to its replacement too.

    Returns:
        the errors by replaced module, the first batch, and the model's first output tensor on it.
    """
    errors = {old: OutputError(new) for old, new in replacements.items()}
    first_batch: Any = None
    first_output: torch.Tensor | None = None
    handles = [old.register_forward_hook(error.hook, with_kwargs=True) for old, error in errors.items()]
    try:
        with evaluating(model):
            for i, batch in enumerate(batches(data)):
                output = run(model, batch)
                if i == 0:
                    first_batch, first_output = batch, first_tensor(output)
    finally:
        for handle in handles:
            handle.remove()
    return errors, first_batch, first_output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without torch's Transformer fast path, which calls no child modules."""
    training = [m for m in model.modules() if m.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in training:
            module.training = True
