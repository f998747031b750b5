"""Keeps what a recipe's transforms have made of a model, so that a run that was cut off goes on behind the last one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tcompress.formats.checkpoint import content_of, put_content
from tcompress.report.report import LayerReport
from tcompress.resume import StageStore
from tcompress.structure import is_marked, mark_shared

#: Of a run with transforms, the folder in its folder for the layers that algorithms solve after them.
LAYERS = "layers"


class TransformStore:
    """A folder with the model as the last finished transform left it.

    Kept are tensors, compressed modules and structure, as in a checkpoint (`formats.checkpoint`), the layout of tensors
    in memory, on which last bits may depend, what was changed in configurations, and what the report says so far.

    Args:
        folder, run: as for `StageStore`.
        model: before its transforms.

    Raises:
        ValueError, OSError: as `StageStore`.
    """

    def __init__(self, folder: str | Path, run: str, model: nn.Module) -> None:
        self._store = StageStore(folder, run)
        self._configs = [dict(vars(config)) for config in _configs(model)]

    def save(self, number: int, model: nn.Module, notes: list[str], layers: list[LayerReport]) -> None:
        """Keeps a model after its transform of this number, in place of what was kept before."""
        tensors, content = content_of(model)
        strides = {key: list(t.stride()) for key, t in model.state_dict().items() if key in tensors and _is_dense(t)}
        changed = [
            {key: value for key, value in vars(config).items() if key not in before or before[key] != value}
            for config, before in zip(_configs(model), self._configs, strict=True)
        ]
        info = {
            "content": content,
            "strides": strides,
            "configs": changed,
            "marked": is_marked(model),
            "notes": notes,
            "layers": [layer.model_dump(mode="json") for layer in layers],
        }
        self._store.save(_name(number), tensors, info)
        if number:
            self._store.discard(_name(number - 1))

    def last(self, count: int) -> int | None:
        """The number of the last transform of so many that is finished, or None."""
        return next((i for i in reversed(range(count)) if self._store.has(_name(i))), None)

    def load(self, number: int, model: nn.Module) -> tuple[list[str], list[LayerReport]]:
        """Makes of a model what `save` was given, in place. Returns notes and layers."""
        found = self._store.load(_name(number))
        assert found is not None
        tensors, info = found
        devices = {key: tensor.device for key, tensor in model.state_dict().items()}
        default = next(iter(devices.values()), torch.device("cpu"))
        laid_out = {}
        for key, tensor in tensors.items():
            stride = info["strides"].get(key) or tensor.stride()
            # Also a copy, aligned as torch aligns its tensors: a file's are not.
            empty = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=devices.get(key, default))
            laid_out[key] = empty.copy_(tensor)
        put_content(model, laid_out, info["content"], str(self._store.folder))
        for config, changes in zip(_configs(model), info["configs"], strict=True):
            vars(config).update(changes)
        if info["marked"] and not is_marked(model):
            mark_shared(model)
        return info["notes"], [LayerReport.model_validate(layer) for layer in info["layers"]]


def _name(number: int) -> str:
    return f"transform-{number}"


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether its elements fill a piece of memory in some order of its dimensions, but not the usual one."""
    return not tensor.is_contiguous() and torch.empty_like(tensor, device="meta").stride() == tensor.stride()


def _configs(model: nn.Module) -> Iterator[Any]:
    """The configurations of a `transformers` model and its parts, each once."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            seen.setdefault(id(config), config)
    return iter(list(seen.values()))
