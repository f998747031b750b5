"""What a long run has finished, in a folder, so that a run that was cut off goes on from there."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from tcompress.errors import message
from tcompress.recipe import Finetune, Recipe

#: The folder's format; raised when an old folder would be read differently.
VERSION = 1
_RUN = "run.json"


def fingerprint(model: nn.Module, recipe: Recipe, samples: Sequence[Any]) -> str:
    """A digest of all that a run's results follow from: the model's weights, the recipe, the data, torch's version.

    A `Finetune` step comes after all that is kept here, and may be another one when the run is taken up.
    The number of threads is not in it, though the last bits of floating-point sums may depend on it.
    """
    digest = hashlib.blake2b(digest_size=20)
    recipe = recipe.model_copy(update={"steps": tuple(s for s in recipe.steps if not isinstance(s, Finetune))})
    for part in (VERSION, torch.__version__, type(model).__qualname__, recipe.to_yaml()):
        digest.update(f"{part}\n".encode())
    for name, tensor in sorted(model.state_dict(keep_vars=True).items()):
        digest.update(f"{name}\n".encode())
        _add(digest, tensor)
    for sample in samples:
        _add(digest, sample)
    return digest.hexdigest()


def digest_of(values: Any) -> str:
    """Of tensors, and of mappings and sequences of such."""
    digest = hashlib.blake2b(digest_size=20)
    _add(digest, values)
    return digest.hexdigest()


def _add(digest: hashlib.blake2b, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        digest.update(f"{value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            digest.update(f"{key}\n".encode())
            _add(digest, item)
    elif isinstance(value, tuple | list):
        for item in value:
            _add(digest, item)
    else:
        digest.update(f"{value!r}\n".encode())


class StageStore:
    """A folder with a file of tensors for each stage of a run that is done.

    A file is written under another name and renamed, so that it is whole or not there.

    Args:
        folder: made if it is missing; empty, or of a run with this fingerprint.
        run: the fingerprint.

    Raises:
        ValueError: the folder is of another run, or holds something else. OSError: it cannot be written.
    """

    def __init__(self, folder: str | Path, run: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        found = self.folder / _RUN
        if found.is_file():
            hint = "a finished part fits only the same model, recipe, data and torch; give another folder or delete it"
            if _content(found) != {"version": VERSION, "run": run}:
                raise ValueError(message("compress", "resume", f"{folder}, the folder of another run", "its own", hint))
            return
        if any(path.suffix != ".tmp" for path in self.folder.iterdir()):
            raise ValueError(message("compress", "resume", f"{folder}, which holds other files", "an empty folder"))
        temporary = self.folder / f"{_RUN}.tmp"
        temporary.write_text(json.dumps({"version": VERSION, "run": run}))
        os.replace(temporary, found)

    def save(self, stage: str, tensors: Mapping[str, torch.Tensor], info: Any) -> None:
        """Keeps what a stage has found: tensors, and something that JSON can hold."""
        path = self._path(stage)
        temporary = path.with_name(path.name + ".tmp")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, {"info": json.dumps(info)})
        os.replace(temporary, path)

    def load(self, stage: str) -> tuple[dict[str, torch.Tensor], Any] | None:
        """What `save` kept of a stage, on the CPU, or None.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._path(stage)
        if not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["info"])  # noqa: SIM118
        except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
            hint = "delete it and its stage runs again"
            raise ValueError(
                message("compress", "resume", f"{path}, damaged ({error})", "a whole file", hint)
            ) from error

    def has(self, stage: str) -> bool:
        """Whether something was kept of a stage."""
        return self._path(stage).is_file()

    def discard(self, stage: str) -> None:
        """Forgets a stage."""
        self._path(stage).unlink(missing_ok=True)

    def _path(self, stage: str) -> Path:
        return self.folder / f"{stage}.safetensors"


def _content(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return None
