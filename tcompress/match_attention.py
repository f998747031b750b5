"""Which attention an attention step means, and why some of it stays in floating point."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torch.nn.utils import parametrize

from tcompress.integrations.attention_modules import CHILD, interface_modules
from tcompress.match import Skip, any_matches, ignored
from tcompress.nn import Int8Attention, Int8MultiheadAttention, MultiHeadAttention
from tcompress.nn.int8_multihead_attention import why_not_convertible
from tcompress.ops.attention_options import MAX_HEAD_DIM
from tcompress.ops.quantize_per_token import FLOAT_DTYPES
from tcompress.recipe import Quantize, Recipe

Kind = Literal["torch", "tcompress", "transformers"]


@dataclass(frozen=True)
class AttentionMatch:
    """Attention that a step quantizes.

    Attributes:
        names: all paths of the module.
        module: the module as it is in the model.
        kind: whose class it is.
        attention: what will compute its attention, in floating point until it is decided.
        converted: of a `torch.nn.MultiheadAttention`, what takes its place, around views of its weights.
    """

    names: tuple[str, ...]
    module: nn.Module
    step: Quantize
    kind: Kind
    attention: Int8Attention
    converted: Int8MultiheadAttention | None = None


def match_attention(model: nn.Module, recipe: Recipe) -> tuple[list[AttentionMatch], list[Skip]]:
    """Finds the attention that the recipe's steps quantize, in the order of the model.

    Raises:
        ValueError: a pattern is not a regular expression.
    """
    steps = [step for step in recipe.steps if isinstance(step, Quantize) and step.attention is not None]
    if not steps:
        return [], []
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    matches: list[AttentionMatch] = []
    skips: list[Skip] = []
    for module, obstacle in candidates(model).items():
        reasons: list[str] = []
        for step in steps:
            if not any_matches(step.targets, names[module], module):
                continue
            reason = ignored(step, names[module], module, None) or obstacle
            if reason is None:
                matches.append(_match(tuple(names[module]), module, step))
                break
            reasons.append(reason)
        else:
            if reasons:
                skips.append(Skip(tuple(names[module]), module, reasons[0]))
    return matches, skips


@contextmanager
def holding(model: nn.Module, converted: Mapping[nn.Module, nn.Module]) -> Iterator[None]:
    """Lets a model hold for a while what will take the place of torch's attention, whose projections are layers.

    A model that is such attention itself stands in no place: it is for a while what would take its own, by its class
    and its attributes, so that it can be called, walked through and copied as any other.
    """
    if model in converted:
        own, attributes, new = type(model), vars(model), converted[model]
        model.__class__, model.__dict__ = type(new), vars(new)
        try:
            yield
        finally:
            model.__class__, model.__dict__ = own, attributes
        return
    places = [(parent, name, child) for parent in model.modules() for name, child in parent._modules.items()]
    places = [(parent, name, child) for parent, name, child in places if child in converted]
    for parent, name, child in places:
        assert child is not None
        parent._modules[name] = converted[child]
    try:
        yield
    finally:
        for parent, name, child in places:
            parent._modules[name] = child


def candidates(model: nn.Module) -> dict[nn.Module, str | None]:
    """All attention in a model, in its order, each with the reason why it cannot be quantized, or None."""
    found = interface_modules(model)
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention | Int8MultiheadAttention):
            found[module] = _why_not_torch(module)
        elif isinstance(module, MultiHeadAttention):
            found[module] = _why_not_ours(module)
    inside = {child for module in found for child in module.modules()}
    for module in reversed(list(model.modules())):  # children first: of custom attention the innermost module counts
        custom = "attention" in type(module).__name__.lower() and module not in inside
        if custom and not any(child in found for child in module.modules()) and list(module.parameters()):
            found[module] = f"{type(module).__name__} computes its attention itself"
    return {m: _plain_reason(m) or found[m] for m in model.modules() if m in found}


def _match(names: tuple[str, ...], module: nn.Module, step: Quantize) -> AttentionMatch:
    if isinstance(module, MultiHeadAttention):
        return AttentionMatch(names, module, step, "tcompress", module.attention)
    if isinstance(module, nn.MultiheadAttention):
        converted = Int8MultiheadAttention.from_torch(module, precision="float", copy=False)
        return AttentionMatch(names, module, step, "torch", converted.attention, converted)
    attention = Int8Attention(precision="float").train(module.training)
    return AttentionMatch(names, module, step, "transformers", attention)


def _why_not_torch(module: nn.Module) -> str | None:
    if not isinstance(module, nn.MultiheadAttention):
        return "already compressed"
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is a subclass of MultiheadAttention and may compute something else"
    if module.head_dim > MAX_HEAD_DIM:
        return f"its head_dim {module.head_dim} is above {MAX_HEAD_DIM}"
    return why_not_convertible(module)


def _why_not_ours(module: MultiHeadAttention) -> str | None:
    if module.attention.precision == "int8":
        return "already compressed"
    if type(module).forward is not MultiHeadAttention.forward:
        return f"{type(module).__name__} has a forward of its own"
    return f"its d_head {module.d_head} is above {MAX_HEAD_DIM}" if module.d_head > MAX_HEAD_DIM else None


def _plain_reason(module: nn.Module) -> str | None:
    """What holds for attention of every kind."""
    if hasattr(module, CHILD):
        return "already compressed"
    if isinstance(module, nn.MultiheadAttention):
        if any(parametrize.is_parametrized(m) for m in module.modules()):
            return "it is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes its weights plain"
        if any(m._forward_hooks or m._forward_pre_hooks for m in module.modules()):
            return "it has forward hooks, which a replacement would lose"
    for parameter in module.parameters():
        if parameter.device.type == "meta":
            return "its weights are on the meta device: load the checkpoint first"
        if parameter.is_floating_point() and parameter.dtype not in FLOAT_DTYPES:
            return f"its weights are {parameter.dtype}, and attention takes float32, bfloat16 or float16"
    return None
