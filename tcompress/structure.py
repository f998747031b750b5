"""What of a model differs from its architecture: layers that are gone, and sizes that are smaller.

A step that changes the structure marks each module that it changed, on the module itself: marks go along when a model
is copied, when layers before a module go, and to what takes a module's place (`carry`). A checkpoint stores the state
of the marked modules (`describe_structure`), and `restore` gives it to a model of the original architecture. Only state
is kept, not how it came to be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn

from tcompress.errors import message
from tcompress.weights import is_conv1d, linear_weight

_MARK = "_tcompress_structure"
M = TypeVar("M", bound=nn.Module)


class ModuleStructure(BaseModel):
    """One changed module.

    Attributes:
        size: of a linear layer, [N, K].
        attributes: whole numbers, such as num_heads.
        kept: of a `torch.nn.ModuleList`, which of the architecture's members are left.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    size: tuple[int, int] | None = None
    attributes: dict[str, int] = {}
    kept: tuple[int, ...] | None = None


def mark_size(layer: nn.Module) -> None:
    """Says that a linear layer has another size than the architecture."""
    _mark(layer)["size"] = True


def mark_attributes(module: nn.Module, names: Sequence[str]) -> None:
    """Says that whole numbers of a module differ from the architecture's."""
    _mark(module)["attributes"] = sorted({*_mark(module).get("attributes", ()), *names})


def mark_kept(modules: nn.ModuleList, kept: Sequence[int]) -> None:
    """Says that of a list's members only these are left; counted before they went."""
    before = _mark(modules).get("kept")
    _mark(modules)["kept"] = [before[i] for i in kept] if before is not None else list(kept)


def mark_shared(model: nn.Module) -> None:
    """Says that parameters of a model are tied that are not in its architecture."""
    _mark(model)


def is_marked(model: nn.Module) -> bool:
    """Whether a step has changed the structure of a model."""
    return any(_MARK in vars(module) for module in model.modules())


def carry(old: nn.Module, new: M) -> M:
    """Gives the marks of a module to what takes its place, and returns that."""
    if _MARK in vars(old):
        object.__setattr__(new, _MARK, dict(vars(old)[_MARK]))
    return new


def describe_structure(model: nn.Module) -> dict[str, ModuleStructure]:
    """The marked modules of a model by path, parents first; a module at several places stands at each."""
    found: dict[str, ModuleStructure] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        mark = vars(module).get(_MARK)
        if mark:
            size = _size(module) if mark.get("size") else None
            attributes = {key: int(getattr(module, key)) for key in mark.get("attributes", ())}
            kept = mark.get("kept")
            found[name] = ModuleStructure(size=size, attributes=attributes, kept=None if kept is None else tuple(kept))
    return found


def restore(model: nn.Module, structure: dict[str, ModuleStructure]) -> Callable[[], None]:
    """Gives a model of the original architecture the structure of a checkpoint, in place. Weights that change their
    size lose their values. What fits already is left.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: a module is not there, or is of another kind. The model is then unchanged.
    """
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]] = []

    def undo() -> None:
        for module, values, parameters, modules in reversed(before):
            vars(module).clear()
            vars(module).update(values)
            module._parameters, module._modules = parameters, modules

    try:
        for name in sorted(structure, key=lambda path: path.count(".") if path else -1):
            wanted = structure[name]
            try:
                module = model.get_submodule(name)
            except AttributeError as error:
                raise ValueError(message("load", "model", f"no module {name!r}", "one there", _HINT)) from error
            before.append((module, dict(vars(module)), dict(module._parameters), dict(module._modules)))
            _restore_one(name, module, wanted)
            _copy_marks(module, wanted)
    except ValueError:
        undo()
        raise
    return undo


_HINT = "is it the architecture that was saved?"


def _restore_one(name: str, module: nn.Module, wanted: ModuleStructure) -> None:
    if wanted.kept is not None:
        if not isinstance(module, nn.ModuleList):
            raise ValueError(message("load", f"model.{name}", type(module).__name__, "a ModuleList", _HINT))
        if len(module) != len(wanted.kept):
            if max(wanted.kept, default=0) >= len(module):
                expected = f"{max(wanted.kept) + 1} or more, or {len(wanted.kept)}"
                raise ValueError(message("load", f"model.{name}", f"{len(module)} members", expected, _HINT))
            keep_members(module, wanted.kept)
    for key, value in wanted.attributes.items():
        if type(vars(module).get(key)) is not int:
            got = f"{type(module).__name__} without a whole number {key!r}"
            raise ValueError(message("load", f"model.{name}", got, "one with it", _HINT))
        setattr(module, key, value)
    if (
        wanted.size is not None
        and (isinstance(module, nn.Linear) or is_conv1d(module))
        and _size(module) != wanted.size
    ):
        n, k = wanted.size
        weight: torch.Tensor = module.weight  # type: ignore[assignment]
        shape = (k, n) if is_conv1d(module) else (n, k)
        set_linear(
            module,
            torch.empty(shape, dtype=weight.dtype, device="meta"),
            None if module.bias is None else torch.empty(n, dtype=weight.dtype, device="meta"),
        )


def _copy_marks(module: nn.Module, wanted: ModuleStructure) -> None:
    if wanted.size is not None:
        mark_size(module)
    if wanted.attributes:
        mark_attributes(module, list(wanted.attributes))
    if wanted.kept is not None:
        _mark(module)["kept"] = list(wanted.kept)
    _mark(module)


def keep_members(modules: nn.ModuleList, kept: Sequence[int]) -> None:
    """Takes the other members out of a list, in place."""
    members = list(modules)
    modules._modules = {str(i): members[j] for i, j in enumerate(kept)}


def set_linear(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Gives a linear layer other tensors, the weight as its class stores it, and the numbers that go with them."""
    old: Any = layer.weight
    layer._parameters["weight"] = nn.Parameter(weight, old.requires_grad)
    if bias is not None:
        layer._parameters["bias"] = nn.Parameter(bias, old.requires_grad)
    n, k = _size(layer)
    for key, value in (("out_features", n), ("nf", n), ("in_features", k), ("nx", k)):
        if key in vars(layer):
            setattr(layer, key, value)


def _size(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Linear) or is_conv1d(module):
        n, k = linear_weight(module).shape
    else:  # a compressed one
        n, k = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
    return n, k


def _mark(module: nn.Module) -> dict[str, Any]:
    if _MARK not in vars(module):
        object.__setattr__(module, _MARK, {})
    mark: dict[str, Any] = vars(module)[_MARK]
    return mark
