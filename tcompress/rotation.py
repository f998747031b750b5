"""The rotation of a residual stream: what it changes, a trial of it, and its fold into the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcompress.pairs import Pair
from tcompress.pairs.find import is_linear
from tcompress.pairs.stream import Stream
from tcompress.weights import is_conv1d

#: How far f(x Q) may be from f(x) Q for a norm f, relative to its norm.
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Rotation:
    """A rotation Q and what it changes.

    With f(x) g + b a norm whose f commutes with Q, that is f(x Q) = f(x) Q::

        embeddings              E ↦ E Q
        linear layers that      write: W ↦ Qᵀ W, b ↦ b Q        read by a norm: W ↦ W diag(g) Q        read: W ↦ W Q
        norms                   g ↦ 1, b ↦ (b / g) Q

    Attributes:
        matrix: Q, float64 [D, D].
        kind: what it is, in words.
        writers: embeddings and linear layers whose outputs are terms of the stream.
        norms: those that read it, with the linear layers that they feed.
        direct: linear layers that read it without a norm.
    """

    matrix: torch.Tensor
    kind: str
    writers: tuple[nn.Module, ...]
    norms: tuple[Pair, ...]
    direct: tuple[nn.Module, ...]

    @property
    def readers(self) -> list[nn.Module]:
        """All linear layers that read the stream."""
        return [c.module for pair in self.norms for c in pair.consumers] + list(self.direct)

    @contextmanager
    def tried(self) -> Iterator[None]:
        """The model as it will be, computed by hooks: rotated where the stream is written, back where it is read."""
        with ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.register_forward_hook(self._turn).remove)
            for pair in self.norms:
                hook = self._back(_gain(pair))
                stack.enter_context(_replaced(pair, self._new_parameters(pair)))
                for c in pair.consumers:
                    stack.callback(c.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for module in self.direct:
                stack.callback(module.register_forward_pre_hook(self._back(None), with_kwargs=True).remove)
            yield

    @torch.no_grad()
    def fold(self) -> None:
        """Changes the weights, in float64 and rounded to their type."""
        done: set[int] = set()  # embeddings may share a table
        for writer in self.writers:
            for name, parameter in writer._parameters.items():
                if parameter is None or id(parameter) in done:
                    continue
                done.add(id(parameter))
                q, value = self.matrix.to(parameter.device), parameter.double()
                rows = name == "bias" or isinstance(writer, nn.Embedding) or is_conv1d(writer)
                parameter.copy_(value @ q if rows else q.T @ value)
        for pair in self.norms:
            new = self._new_parameters(pair)
            for c in pair.consumers:
                self._fold_reader(c.module, _gain(pair))
            for name, value in new.items():
                parameter = pair.source._parameters[name]
                assert parameter is not None
                parameter.copy_(value)
        for module in self.direct:
            self._fold_reader(module, None)

    def _fold_reader(self, module: nn.Module, gain: torch.Tensor | None) -> None:
        weight = module._parameters["weight"]
        assert weight is not None
        q = self.matrix.to(weight.device)
        if gain is not None:
            q = gain.to(q.device)[:, None] * q
        weight.copy_(q.T @ weight.double() if is_conv1d(module) else weight.double() @ q)

    def _new_parameters(self, pair: Pair) -> dict[str, torch.Tensor]:
        weight, bias = pair.source._parameters["weight"], pair.source._parameters.get("bias")
        assert weight is not None
        new = {"weight": torch.zeros_like(weight) if pair.kind == "one_plus" else torch.ones_like(weight)}
        if bias is not None:
            gain = _gain(pair)
            moved = torch.where(bias == 0, 0, bias.double() / gain)
            new["bias"] = (moved @ self.matrix.to(bias.device)).to(bias.dtype)
        return new

    def _turn(self, module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return (output.double() @ self.matrix.to(output.device)).to(output.dtype)

    def _back(self, gain: torch.Tensor | None) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x, *rest = args or (next(iter(kwargs.values())),)
            turned = x.double() @ self.matrix.T.to(x.device)
            return ((turned if gain is None else turned * gain).to(x.dtype), *rest), {}

        return hook


def rotation_of(
    stream: Stream,
    pairs: Mapping[nn.Module, Pair],
    inputs: Mapping[nn.Module, torch.Tensor],
    names: Mapping[nn.Module, str],
    matrix: torch.Tensor,
    kind: str,
) -> Rotation | str:
    """What a rotation of this stream changes, or why it cannot be rotated.

    Args:
        pairs: by norm. inputs: a few rows of what each norm is given. names: of all modules.
    """
    if stream.obstacles:
        return "; ".join(stream.obstacles)
    for writer in stream.writers:
        if isinstance(writer, nn.Embedding):
            if writer.max_norm is not None:
                return f"{names[writer]} has max_norm"
        elif not is_linear(writer):
            return f"{names[writer]} writes into it, and is no linear layer"
    norms, direct = [], []
    for reader in stream.readers:
        if is_linear(reader):
            direct.append(reader)
            continue
        pair = pairs.get(reader)
        if pair is None:
            return f"{names[reader]} feeds more than linear layers"
        channels = torch.arange(pair.size)
        if any(not torch.equal(c.channels.cpu(), channels) for c in pair.consumers):
            return f"{names[reader]}'s channels are rearranged before they are read"
        if not _commutes(pair, inputs[reader], matrix):
            return f"{names[reader]} ({type(reader).__name__}) does not commute with a rotation"
        bias = reader._parameters.get("bias")
        if bias is not None and bool(((_gain(pair) == 0) & (bias != 0)).any()):
            return f"{names[reader]} has a weight of zero where its bias is none"
        norms.append(pair)
    writers = sorted(stream.writers, key=lambda m: not isinstance(m, nn.Embedding))
    rotation = Rotation(matrix, kind, tuple(writers), tuple(norms), tuple(direct))
    return _shared_weight(rotation, names) or rotation


def _shared_weight(rotation: Rotation, names: Mapping[nn.Module, str]) -> str:
    """Which weight would have to be rotated in two ways, or ""."""
    for group in (set(rotation.writers), *({module} for module in rotation.readers)):
        weights = {id(p): module for module in group for p in module.parameters(recurse=False)}
        for other, name in names.items():
            if other not in group and any(id(p) in weights for p in other.parameters(recurse=False)):
                shared = next(weights[id(p)] for p in other.parameters(recurse=False) if id(p) in weights)
                return f"a weight of {names[shared]} is also {name}'s"
    return ""


def _commutes(pair: Pair, x: torch.Tensor, matrix: torch.Tensor) -> bool:
    """Whether the norm without its weight and bias gives f(x Q) = f(x) Q, tried on some of its inputs."""
    q = matrix.to(x.device, torch.float32)
    weight = pair.source._parameters["weight"]
    assert weight is not None
    plain = {"weight": torch.zeros_like(weight) if pair.kind == "one_plus" else torch.ones_like(weight)}
    if pair.source._parameters.get("bias") is not None:
        plain["bias"] = torch.zeros_like(weight)
    plain = {name: value.float() for name, value in plain.items()}
    with _replaced(pair, plain):
        expected, got = pair.source(x.float()).float() @ q, pair.source(x.float() @ q).float()
    return bool((got - expected).norm() <= _TOLERANCE * expected.norm())


def _gain(pair: Pair) -> torch.Tensor:
    """By what a norm multiplies each channel, float64 [D]."""
    weight = pair.source._parameters["weight"]
    assert weight is not None
    return 1 + weight.detach().double() if pair.kind == "one_plus" else weight.detach().double()


@contextmanager
def _replaced(pair: Pair, parameters: Mapping[str, torch.Tensor]) -> Iterator[None]:
    held = pair.source._parameters
    before = {name: held[name] for name in parameters}
    held.update({name: nn.Parameter(value, requires_grad=False) for name, value in parameters.items()})
    try:
        yield
    finally:
        held.update(before)
