"""Moves activation functions, and the product of a gated feed-forward network, into the kernels of linear layers.

What a module's forward does is read from its source: `self.act(self.fc(x))`, or the same in two statements one after
the other, where neither is used anywhere else in its class. Nothing is run, and what is not recognised stays as it is.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.nn.feed_forward import FeedForward
from tcompress.nn.gated_feed_forward import GatedFeedForward
from tcompress.nn.quantized_linear import QuantizedLinear
from tcompress.nn.sparse_linear import SparseLinear

_FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def fuse(model: nn.Module) -> list[str]:
    """Fuses in place wherever it is safe.

    Returns:
        The paths of the linear layers that now apply an activation themselves, and of the gated networks.
    """
    places = Counter(id(child) for parent in model.modules() for child in parent._modules.values())
    fused: list[str] = []
    for name, parent in list(model.named_modules()):
        if isinstance(parent, FeedForward):
            fused += _fuse_feed_forward(name, parent, places)
        elif isinstance(parent, nn.Sequential):
            fused += _fuse_sequential(name, parent, places)
        else:
            fused += _fuse_calls(model, name, parent, places)
    return fused


def activation_of(module: nn.Module) -> str | None:
    """The name of the activation that a module without state computes, found by trying it; or None."""
    if isinstance(module, nn.Identity) or module.state_dict() or list(module.children()):
        return None
    if not type(module).__module__.startswith(("torch.nn.modules.activation", "transformers.activations")):
        return None
    x = torch.linspace(-9, 9, 1000).view(10, 100)
    with torch.no_grad():
        y = module(x)
    for name, function in _FUNCTIONS.items():
        if isinstance(y, torch.Tensor) and y.shape == x.shape and torch.allclose(y, function(x), rtol=1e-5, atol=1e-6):
            return name
    return None


def _can_take(linear: object, places: Counter[int]) -> TypeGuard[QuantizedLinear | SparseLinear]:
    return (
        isinstance(linear, QuantizedLinear | SparseLinear)
        and linear.activation == linear.fused_activation == "none"
        and places[id(linear)] == 1
    )


def _fuse_feed_forward(name: str, parent: FeedForward, places: Counter[int]) -> list[str]:
    linear: nn.Module = parent.linear1
    if not _can_take(linear, places):
        return []
    linear.fused_activation = parent.activation
    return [f"{name}.linear1".lstrip(".")]


def _fuse_sequential(name: str, parent: nn.Sequential, places: Counter[int]) -> list[str]:
    if type(parent).forward is not nn.Sequential.forward:
        return []
    fused = []
    children = list(parent._modules.items())
    for (first, linear), (second, act) in pairwise(children):
        if _can_take(linear, places) and act is not None:
            activation = activation_of(act)
            if activation is not None and not act._forward_hooks and not act._forward_pre_hooks:
                linear.fused_activation = activation
                parent._modules[second] = nn.Identity().train(act.training)
                fused.append(f"{name}.{first}".lstrip("."))
    return fused


def _fuse_calls(model: nn.Module, name: str, parent: nn.Module, places: Counter[int]) -> list[str]:
    fused = []
    if not any(isinstance(child, QuantizedLinear | SparseLinear) for child in parent.children()):
        return []
    cls: type = type(parent)
    for outer, inner in _chained_calls(cls):
        linear, act = parent._modules.get(inner), parent._modules.get(outer)
        if act is None or not _can_take(linear, places) or act._forward_hooks or act._forward_pre_hooks:
            continue
        activation = activation_of(act)
        if activation is not None:
            linear.fused_activation = activation
            parent._modules[outer] = nn.Identity().train(act.training)
            fused.append(f"{name}.{inner}".lstrip("."))
    gated = _gated(cls)
    if gated is not None and name:
        replacement = GatedFeedForward.around(parent, gated)
        if replacement is not None and all(places[id(child)] <= 1 for child in parent.children()):
            _replace(model, parent, replacement)
            fused.append(name)
    return fused


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(model.modules()):
        for key, child in parent._modules.items():
            if child is old:
                parent._modules[key] = new


# ---- reading a class's source ---------------------------------------------------------------------------------------


@cache
def _methods(cls: type) -> dict[str, ast.FunctionDef] | None:
    """The methods of a module's class by name, those of base classes included; None where there is no source."""
    methods: dict[str, ast.FunctionDef] = {}
    for base in reversed(cls.__mro__):
        if not issubclass(base, nn.Module) or base is nn.Module:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):  # defined at a prompt, or compiled
            return None
        body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
        methods |= {item.name: item for item in body if isinstance(item, ast.FunctionDef)}
    return methods if "forward" in methods else None


def _self_call(node: ast.expr | None) -> tuple[str, ast.expr] | None:
    """`self.name(argument)` as (name, argument)."""
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "self"
        and len(node.args) == 1
        and not node.keywords
    ):
        return node.func.attr, node.args[0]
    return None


def _uses(methods: dict[str, ast.FunctionDef]) -> Counter[str]:
    """How often each `self.name` is read outside the constructor."""
    reads = (node for name, m in methods.items() if name != "__init__" for node in ast.walk(m))
    return Counter(
        node.attr
        for node in reads
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Load)
        and isinstance(node.value, ast.Name)
        and node.value.id == "self"
    )


@cache
def _chained_calls(cls: type) -> tuple[tuple[str, str], ...]:
    """Pairs (outer, inner) of `self.outer(self.inner(x))` in forward, each read nowhere else in the class."""
    methods = _methods(cls)
    if methods is None:
        return ()
    uses, pairs = _uses(methods), []
    for node in ast.walk(methods["forward"]):
        outer = _self_call(node) if isinstance(node, ast.expr) else None
        inner = _self_call(outer[1]) if outer else None
        if outer and inner:
            pairs.append((outer[0], inner[0]))
        body = getattr(node, "body", None)
        if isinstance(body, list):
            pairs += _chained_statements(body)
    return tuple(pair for pair in pairs if all(uses[name] == 1 for name in pair))


def _chained_statements(body: list[ast.stmt]) -> list[tuple[str, str]]:
    """`h = self.inner(x)` and, next, `h = self.outer(h)`."""
    pairs = []
    for first, second in pairwise(body):
        names = [_assigned_name(s) for s in (first, second)]
        if names[0] is None or names[0] != names[1]:
            continue
        inner, outer = (_self_call(s.value) for s in (first, second) if isinstance(s, ast.Assign))
        if inner and outer and isinstance(outer[1], ast.Name) and outer[1].id == names[0]:
            pairs.append((outer[0], inner[0]))
    return pairs


def _assigned_name(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


@cache
def _gated(cls: type) -> tuple[str, str, str, str] | None:
    """(down, act, gate, up) of a forward that is `return self.down(self.act(self.gate(x)) * self.up(x))`, with or
    without a name for the result, and nothing else."""
    methods = _methods(cls)
    if methods is None:
        return None
    forward = methods["forward"]
    statements = [s for s in forward.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    if not statements or not isinstance(statements[-1], ast.Return) or len(forward.args.args) != 2:
        return None
    value = statements[-1].value
    if len(statements) == 2 and isinstance(value, ast.Name) and _assigned_name(statements[0]) == value.id:
        value = statements[0].value  # type: ignore[attr-defined]
    elif len(statements) != 1:
        return None
    down = _self_call(value)
    product = down[1] if down else None
    if not isinstance(product, ast.BinOp) or not isinstance(product.op, ast.Mult):
        return None
    act, up = _self_call(product.left), _self_call(product.right)
    gate = _self_call(act[1]) if act else None
    if down is None or act is None or up is None or gate is None:
        return None
    x = forward.args.args[1].arg
    if any(not isinstance(part[1], ast.Name) or part[1].id != x for part in (gate, up)):
        return None
    return down[0], act[0], gate[0], up[0]
