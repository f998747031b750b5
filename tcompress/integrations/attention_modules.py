"""Finds the attention modules of `transformers` models, and gives each an `Int8Attention` of its own.

Such a module computes its projections itself and hands q, k and v to a function that its configuration names
(`transformers`' AttentionInterface). Here that function becomes "tcompress", which calls the module's child
`tcompress_attention`.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import nn

from tcompress.errors import message
from tcompress.integrations.transformers_attention import NAME, register
from tcompress.nn.int8_attention import Int8Attention
from tcompress.ops.attention_options import MAX_HEAD_DIM

#: Name of the child that computes a module's attention.
CHILD = "tcompress_attention"
#: What the function is told by name and can do, or need not know: sizes for flash attention, which passes them alone.
_UNDERSTOOD = {
    *("query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "softcap"),
    "position_bias",
    *("sliding_window", "output_attentions", "position_ids", "deterministic"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
}
_HEAD_DIMS = ("head_dim", "attention_head_size", "qk_head_dim", "v_head_dim", "key_value_proj_dim")


def interface_modules(model: nn.Module) -> dict[nn.Module, str | None]:
    """The modules that call the attention interface, each with the reason why it cannot be quantized, or None."""
    found: dict[nn.Module, str | None] = {}
    for root in _pretrained(model):
        modules = [m for m in root.modules() if _config(m) is not None and _keywords(m) is not None]
        if not modules:
            continue
        obstacle = _obstacle(modules)
        settable = modules if obstacle else _settable(root, modules)
        for module in modules:
            if obstacle is not None:
                found[module] = obstacle
            elif module not in settable:
                found[module] = f"{type(module).__name__} does not let transformers choose its attention function"
            else:
                found[module] = _too_wide(module)
    return found


def _keywords(module: nn.Module) -> frozenset[str] | None:
    cls: type = type(module)
    return interface_keywords(cls)


@cache
def interface_keywords(cls: type) -> frozenset[str] | None:
    """The keywords with which a class calls the attention function that its configuration names, read from the source
    of its forward; None where it calls none."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError):  # defined at a prompt, or compiled
        return None
    functions = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            source = ast.unparse(node.value)
            if "ALL_ATTENTION_FUNCTIONS" in source and "_attn_implementation" in source:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                functions |= {ast.unparse(target) for target in targets}
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) in functions]
    return frozenset(k.arg for call in calls for k in call.keywords if k.arg) if calls else None


def attach(model: nn.Module, attentions: Mapping[str, Int8Attention]) -> None:
    """Gives the modules at these paths their attention, and makes the models that hold them use it.

    Every other module of such a model keeps floating point, by an `Int8Attention` of precision "float".

    Raises:
        ValueError: `transformers` did not let a module choose.
    """
    register()
    chosen = {model.get_submodule(name): attention for name, attention in attentions.items()}
    for module, attention in chosen.items():
        setattr(module, CHILD, attention)
    for root in _pretrained(model):
        inside = list(root.modules())
        if not any(module in chosen for module in inside):
            continue
        root.set_attn_implementation(NAME)
        for module in inside:
            calls = _config(module) is not None and _keywords(module) is not None
            if calls and not hasattr(module, CHILD):
                setattr(module, CHILD, Int8Attention(precision="float").train(module.training))
    for name, module in zip(attentions, chosen, strict=True):
        got = getattr(_config(module), "_attn_implementation", None)
        if got != NAME:
            raise ValueError(message("attach", name, f"attention by {got!r}", repr(NAME)))


@contextmanager
def attached(model: nn.Module, attentions: Mapping[str, Int8Attention]) -> Iterator[None]:
    """`attach` inside the `with` block; afterwards the model is as it was."""
    before = {module for module in model.modules() if hasattr(module, CHILD)}
    with _kept_implementation(model):
        try:
            attach(model, attentions)
            yield
        finally:
            for module in list(model.modules()):
                if hasattr(module, CHILD) and module not in before:
                    delattr(module, CHILD)


def _pretrained(model: nn.Module) -> list[Any]:
    """The outermost `transformers` models in a module, itself perhaps."""
    transformers = sys.modules.get("transformers")  # a model of its classes has imported it
    if transformers is None:
        return []
    if isinstance(model, transformers.PreTrainedModel):
        return [model]
    return [root for child in model.children() for root in _pretrained(child)]


def _config(module: nn.Module) -> Any:
    """The configuration that names the module's attention function, or None."""
    config = getattr(module, "config", None)
    return config if hasattr(config, "_attn_implementation_internal") else None


def _obstacle(modules: list[nn.Module]) -> str | None:
    """What keeps a whole model from using the function: it would reach all of these modules."""
    try:
        register()
    except ImportError as error:
        return str(error)
    for module in modules:
        more = sorted((_keywords(module) or frozenset()) - _UNDERSTOOD)
        if more:
            return f"{type(module).__name__} passes {', '.join(more)} to the attention function"
        if getattr(_config(module), "output_attentions", False):
            return "output_attentions: quantized attention has no weights to return"
    return None


def _too_wide(module: nn.Module) -> str | None:
    for name in _HEAD_DIMS:
        size = getattr(module, name, 0)
        if isinstance(size, int) and size > MAX_HEAD_DIM:
            return f"its {name} {size} is above {MAX_HEAD_DIM}"
    return None


def _settable(root: Any, modules: list[nn.Module]) -> set[nn.Module]:
    """The modules whose function `transformers` lets one choose, found by choosing it for a moment."""
    with _kept_implementation(root):
        root.set_attn_implementation(NAME)
        return {m for m in modules if _config(m)._attn_implementation == NAME}


@contextmanager
def _kept_implementation(model: nn.Module) -> Iterator[None]:
    """Restores the attention function that each configuration named before."""
    configs: dict[int, Any] = {}
    for module in model.modules():
        _collect(_config(module), configs)
    names = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        yield
    finally:
        for config, name in names:
            config._attn_implementation_internal = name


def _collect(config: Any, found: dict[int, Any]) -> None:
    if config is None or id(config) in found:
        return
    found[id(config)] = config
    for name in getattr(config, "sub_configs", {}):
        _collect(getattr(config, name, None), found)
