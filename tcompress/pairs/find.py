"""Finds pairs in a model by running it on one sample."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from tcompress.activations import tensors_in
from tcompress.calibrate import evaluating, run
from tcompress.match import module_names
from tcompress.pairs.gain import gain_of, may_have_gain
from tcompress.pairs.trace import ScaleTrace, Source
from tcompress.weights import is_conv1d, linear_weight


@dataclass(frozen=True, eq=False)
class Consumer:
    """A linear layer that reads what a source gives.

    Attributes:
        name, module: it.
        channels: int64 [K], of each of its inputs the source's channel; -1 where that keeps its scale. Several inputs
            are one channel where heads are repeated (grouped-query attention).
    """

    name: str
    module: nn.Module
    channels: torch.Tensor


@dataclass(frozen=True, eq=False)
class Pair:
    """A module and all the readers of its output, between which scales can be moved.

    With y [..., N] the source's output and s [N] > 0: y / s, and columns of the readers' weights times s, compute the
    same.

    Attributes:
        name, source: a norm, or a linear layer.
        kind: how the source is scaled: by its "weight" vector (and bias), by "one_plus" it (Gemma), or, a "linear"
            layer, by its rows.
        size: N.
        consumers: at least one.
    """

    name: str
    source: nn.Module
    kind: Literal["weight", "one_plus", "linear"]
    size: int
    consumers: tuple[Consumer, ...]

    @property
    def used(self) -> torch.Tensor:
        """bool [N]: channels that a reader is known to get. The others keep their scale: they were zero throughout, or
        also go elsewhere, as queries and keys beside values do where one layer gives all three."""
        used = torch.zeros(self.size, dtype=torch.bool, device=self.consumers[0].channels.device)
        for consumer in self.consumers:
            used[consumer.channels[consumer.channels >= 0]] = True
        return used


@dataclass(frozen=True)
class NoPair:
    """A norm or linear layer whose scales have nowhere to go, with the reason."""

    name: str
    module: nn.Module
    reason: str


def find_pairs(model: nn.Module, sample: Any) -> tuple[list[Pair], list[NoPair]]:
    """Finds which norm feeds which linear layers alone, and which linear layer feeds which through operations that
    commute with a scale a channel, such as the attention between values and output projection, or a gate.

    One run of the model with every operation on candidates' outputs done several times over (`pairs.trace`), and one to
    see that the whole output stays what it was, bit for bit, with every pair scaled by powers of two. What it cannot
    see is a path that this sample does not take.

    Args:
        model: left as it is.
        sample: a batch as for `compress`.

    Returns:
        Pairs in the order of the model; norms and linear layers that are no source, with the reason.
    """
    names = {module: paths[0] for module, paths in module_names(model, {}).items()}
    linears = {m: name for m, name in names.items() if is_linear(m)}
    sources = {m: Source(m) for m in names if m in linears or may_have_gain(m)}
    trace = ScaleTrace(sources, linears)
    with evaluating(model):
        trace.run(model, sample)
        expected = list(tensors_in(run(model, sample)))
        kinds = {m: "linear" if m in linears else _gain(m, trace) for m in sources}
        users = _users(model)
        pairs: list[Pair] = []
        reasons: dict[nn.Module, str] = {}
        taken: dict[nn.Module, str] = {}
        for module, source in sources.items():
            reason = _why_not(source, kinds[module], trace, users, names, taken)
            if reason:
                reasons[module] = reason
                continue
            consumers = tuple(Consumer(names[m], m, channels) for m, channels in source.readers.items())
            taken |= {c.module: names[module] for c in consumers}
            weight = linear_weight(module) if module in linears else module._parameters["weight"]
            assert weight is not None
            pairs.append(Pair(names[module], module, kinds[module], weight.shape[0], consumers))  # type: ignore[arg-type]
        wrong = _wrong(model, sample, pairs, expected)
    reasons |= {pair.source: "scales change the model's output" for pair in wrong}
    skipped = [NoPair(names[m], m, reason) for m, reason in reasons.items()]
    return [pair for pair in pairs if pair not in wrong], skipped


def is_linear(module: nn.Module) -> bool:
    """Whether this is a linear layer that computes x Wᵀ + b by its own weight and nothing else."""
    if isinstance(module, NonDynamicallyQuantizableLinear) or parametrize.is_parametrized(module):
        return False
    base = nn.Linear if isinstance(module, nn.Linear) else type(module) if is_conv1d(module) else None
    weight = module._parameters.get("weight")
    if base is None or weight is None or type(module).forward is not base.forward:
        return False
    return weight.is_floating_point() and weight.dim() == 2 and weight.device.type != "meta"


def _gain(module: nn.Module, trace: ScaleTrace) -> str | None:
    x = trace.inputs.get(module)
    return None if x is None else gain_of(module, x)


def _why_not(
    source: Source,
    kind: str | None,
    trace: ScaleTrace,
    users: dict[int, list[nn.Module]],
    names: dict[nn.Module, str],
    taken: dict[nn.Module, str],
) -> str:
    """Why a source makes no pair, or ""."""
    if source.is_over:
        return source.reason
    if kind is None:
        return "its weight does not scale its output, or it never ran"
    if not source.readers:
        return source.reason or "no linear layer reads its output"
    for reader in source.readers:
        if source.calls[reader] != trace.calls[reader]:
            return f"{names[reader]} also reads something else"
        if reader in taken:
            return f"{names[reader]} has its scales from {taken[reader]}"
    for module in (source.module, *source.readers):
        for parameter in module._parameters.values():
            others = [names[m] for m in users.get(id(parameter), []) if m is not module]
            if parameter is not None and others:
                return f"a weight of {names[module]} is also {', '.join(others)}'s"
    for module in (source.module, *source.readers):
        if module in trace.elsewhere:
            return f"a weight of {names[module]} is used outside of it too"
        if module._forward_pre_hooks or module._forward_hooks:
            return f"{names[module]} has forward hooks"
    return ""


def _users(model: nn.Module) -> dict[int, list[nn.Module]]:
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    return users


def _wrong(model: nn.Module, sample: Any, pairs: list[Pair], expected: list[torch.Tensor]) -> list[Pair]:
    """The pairs by whose scales the output changes: halves are tried until each is found."""
    if not pairs:
        return []
    with scaled(pairs):
        got = list(tensors_in(run(model, sample)))
    if len(got) == len(expected) and all(map(_same, got, expected)):
        return []
    if len(pairs) == 1:
        return pairs
    half = len(pairs) // 2
    return _wrong(model, sample, pairs[:half], expected) + _wrong(model, sample, pairs[half:], expected)


def _same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Bit for bit, except in float16, whose smallest numbers lose digits when they are scaled."""
    if got.dtype != torch.float16 or got.shape != expected.shape:
        return torch.equal(got, expected)
    error = (got.float() - expected.float()).abs().max()
    return bool(error <= 8 * torch.finfo(got.dtype).eps * expected.float().abs().max())


@contextmanager
def scaled(pairs: Iterable[Pair]) -> Iterator[None]:
    """Divides what sources give by random powers of two and multiplies what readers get."""
    generator = torch.Generator().manual_seed(1)
    with ExitStack() as stack:
        for pair in pairs:
            exponents = torch.randint(-2, 3, (pair.size,), generator=generator).float()
            exponents[~pair.used.cpu()] = 0

            def divide(module: nn.Module, args: Any, output: torch.Tensor, e: torch.Tensor = exponents) -> torch.Tensor:
                return output * torch.exp2(-e).to(output)

            stack.callback(pair.source.register_forward_hook(divide).remove)
            for consumer in pair.consumers:
                e = exponents[consumer.channels.cpu()].masked_fill(consumer.channels.cpu() < 0, 0)

                def multiply(module: nn.Module, args: Any, kwargs: Any, e: torch.Tensor = e) -> Any:
                    x, *rest = args or (next(iter(kwargs.values())),)
                    return (x * torch.exp2(e).to(x), *rest), {}

                stack.callback(consumer.module.register_forward_pre_hook(multiply, with_kwargs=True).remove)
        yield
