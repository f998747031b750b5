"""Saves and loads a compressed model: safetensors and JSON, no pickle.

A checkpoint is a folder with two files. `tcompress.json` describes the compressed modules and names the file that holds
the tensors, `model-<id>.safetensors`, in the portable storage layout. The JSON file is written last and by renaming, so
a folder always holds one whole checkpoint: the old one until that moment, the new one after it.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from tcompress.errors import message
from tcompress.fast_path import disable_torch_fast_path
from tcompress.formats.module_spec import DESCRIBED, DTYPES, DtypeName, Spec, build, describe, mismatch
from tcompress.formats.skeleton import hugging_face_info, new_model
from tcompress.fuse import fuse
from tcompress.integrations.attention_modules import CHILD, attach, interface_modules
from tcompress.match import COMPRESSED
from tcompress.nn import Int8Attention, Int8MultiheadAttention, LowRankLinear, QuantizedLinear, SparseLinear
from tcompress.nn.packed_module import PackedModule, share_kernel_layout
from tcompress.structure import ModuleStructure, carry, describe_structure, is_marked, restore

METADATA = "tcompress.json"
VERSION = 1
#: Names that `save` gives. Other tools name their files model-*.safetensors too, and those are not ours to delete.
_TENSORS = re.compile(r"model-[0-9a-f]{12}\.safetensors")


class Metadata(BaseModel):
    """The content of `tcompress.json`.

    Attributes:
        tensors: name of the safetensors file, and its size in bytes.
        modules: the compressed modules by path, a module before its children; a path of a module described elsewhere
            maps to that path. "….tcompress_attention" is given to a module of `transformers`.
        aliases: state-dict keys that share the tensor of another key.
        buffer_dtypes: of the float buffers that a state dict leaves out; the model makes them itself, in its own type.
        transformers: class and configuration of a Hugging Face model, with which `load` builds the model itself.
        structure: what differs from the architecture besides: layers that are gone, sizes that are smaller.
    """

    model_config = ConfigDict(extra="forbid")
    format: Literal["tcompress"] = "tcompress"
    version: int = VERSION
    tensors: str
    tensors_bytes: int
    modules: dict[str, Spec | str]
    aliases: dict[str, str] = {}
    buffer_dtypes: dict[str, DtypeName] = {}
    transformers: dict[str, Any] | None = None
    structure: dict[str, ModuleStructure] = {}


def save(model: nn.Module, directory: str | Path) -> Path:
    """Writes a compressed model into a folder, which is made if it is missing.

    A failed save leaves the folder's previous checkpoint as it was.

    Args:
        model: a module that holds at least one compressed module, or whose structure a recipe changed.
        directory: the folder.

    Returns:
        The folder.

    Raises:
        TypeError: not a module. ValueError: nothing in it is compressed, it is a single compressed layer, a module
            keeps state that is not a tensor, or a tensor is on the meta device. OSError: the folder cannot be written.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("save", "model", type(model).__name__, "a torch.nn.Module"))
    modules = _describe_modules(model)
    if not any(map(_is_compressed, model.modules())) and not is_marked(model):
        hint = "keep torch's own modules (also pruned or trained ones) by model.save_pretrained or torch.save"
        raise ValueError(message("save", "model", "one without compressed modules", "a compressed model", hint))
    if "" in modules:
        hint = "wrap it in torch.nn.Sequential"
        raise ValueError(message("save", "model", "a single compressed layer", "a model that holds it", hint))
    tensors, aliases = _unique_tensors(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"model-{uuid.uuid4().hex[:12]}.safetensors"
    temporary = folder / f".{METADATA}.{uuid.uuid4().hex[:12]}"
    try:
        _write_tensors(tensors, path)
        metadata = Metadata(
            tensors=path.name,
            tensors_bytes=path.stat().st_size,
            modules=modules,
            aliases=aliases,
            buffer_dtypes=_unsaved_buffer_dtypes(model),
            transformers=hugging_face_info(model),
            structure=describe_structure(model),
        )
        temporary.write_text(metadata.model_dump_json(indent=1) + "\n")
        os.replace(temporary, folder / METADATA)
    except BaseException:
        # An interrupt may come just after the replacement: the new file is then the checkpoint's.
        metadata_file = folder / METADATA
        if not metadata_file.is_file() or path.name not in metadata_file.read_text():
            path.unlink(missing_ok=True)
        temporary.unlink(missing_ok=True)
        raise
    for stale in folder.iterdir():
        if stale != path and _TENSORS.fullmatch(stale.name):
            stale.unlink()
    return folder


def load(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Reads a checkpoint that `save` wrote, bit for bit.

    Args:
        directory: the folder.
        model: a model of the original architecture, its weights of no account; it is changed in place and returned. A
            Hugging Face model needs none: it is built from the configuration in the checkpoint.

    Returns:
        The model, on the CPU; in evaluation mode if it was built here.

    Raises:
        FileNotFoundError: no checkpoint there. ValueError: it is truncated, of another version, or does not fit the
            model (shapes, missing or unexpected keys). A model that was passed in is then unchanged.
    """
    folder = Path(directory)
    metadata = _read_metadata(folder)
    state = _read_tensors(folder, metadata)
    if model is None:
        if metadata.transformers is None:
            hint = "only Hugging Face models can be built from a checkpoint"
            raise ValueError(message("load", "model", None, "a model of the original architecture", hint))
        model = new_model(metadata.transformers).eval()
    _put(model, state, metadata, folder)
    disable_torch_fast_path(model)
    fuse(model)
    return model


def content_of(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What a checkpoint would hold of a model, compressed or not: tensors, and a description that JSON can hold."""
    tensors, aliases = _unique_tensors(model)
    modules, structure = _describe_modules(model), describe_structure(model)
    metadata = Metadata(tensors="", tensors_bytes=0, modules=modules, aliases=aliases, structure=structure)
    return tensors, metadata.model_dump(mode="json")


def put_content(model: nn.Module, tensors: dict[str, torch.Tensor], content: dict[str, Any], where: str) -> None:
    """Makes of a model of the original architecture the one that `content_of` was given, in place.

    Raises:
        ValueError: they do not fit; the message names `where`. The model is then unchanged.
    """
    metadata = Metadata.model_validate(content)
    state = tensors | {key: tensors[target] for key, target in metadata.aliases.items()}
    _put(model, state, metadata, Path(where))


def _put(model: nn.Module, state: dict[str, torch.Tensor], metadata: Metadata, folder: Path) -> None:
    undo = restore(model, metadata.structure)
    try:
        replacements, attentions = _build_modules(metadata, model)
        _check_fit(folder, model, replacements, state)
        filled = _fill_sparse(replacements, state)
    except BaseException:
        undo()
        raise
    _install(model, replacements, state, filled, metadata)
    if attentions:
        attach(model, attentions)


def _is_compressed(module: nn.Module) -> bool:
    if isinstance(module, Int8Attention):
        return module.precision == "int8"
    return isinstance(module, (*COMPRESSED, LowRankLinear, Int8MultiheadAttention))


def _describe_modules(model: nn.Module) -> dict[str, Spec | str]:
    first: dict[nn.Module, str] = {}
    modules: dict[str, Spec | str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, DESCRIBED):
            modules[name] = first[module] if module in first else describe(module)
            first.setdefault(module, name)
    return modules


def _unique_tensors(model: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The state dict with each tensor once, and the keys that share one."""
    tensors: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for key, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise ValueError(message("save", key, type(value).__name__, "a tensor", "other state needs pickle"))
        if value.device.type == "meta":
            raise ValueError(message("save", key, "a tensor on the meta device", "one with values"))
        identity = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if value.numel() and identity in first:
            aliases[key] = first[identity]
            continue
        first[identity] = key
        tensors[key] = value.detach().contiguous()
    # Views into one storage are copied: safetensors stores each tensor by itself.
    storages: set[int] = set()
    for key, value in tensors.items():
        address = value.untyped_storage().data_ptr()
        if address in storages or value.untyped_storage().nbytes() != value.nbytes:
            tensors[key] = value.clone()
        storages.add(address)
    return tensors, aliases


def _unsaved_buffer_dtypes(model: nn.Module) -> dict[str, str]:
    saved = model.state_dict().keys()
    names = {dtype: name for name, dtype in DTYPES.items()}
    return {key: names[b.dtype] for key, b in model.named_buffers() if key not in saved and b.dtype in names}


def _write_tensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # its form of a full disk
        raise OSError(message("save", path.name, f"an error ({error})", "a file that can be written")) from error


def _read_metadata(folder: Path) -> Metadata:
    path = folder / METADATA
    if not path.is_file():
        raise FileNotFoundError(message("load", "directory", folder, f"a folder with {METADATA}"))
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(message("load", METADATA, f"no JSON ({error})", "JSON", "the file is damaged")) from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        hint = "it was written by another release of tcompress"
        raise ValueError(message("load", "version", version, VERSION, hint))
    try:
        metadata = Metadata.model_validate(content)
    except ValidationError as error:
        raise ValueError(message("load", METADATA, f"a wrong content ({error})", "a checkpoint")) from error
    if Path(metadata.tensors).name != metadata.tensors:
        raise ValueError(message("load", "tensors", repr(metadata.tensors), "a file name without folders"))
    return metadata


def _read_tensors(folder: Path, metadata: Metadata) -> dict[str, torch.Tensor]:
    path = folder / metadata.tensors
    if not path.is_file():
        raise FileNotFoundError(message("load", "tensors", f"no file {path.name}", f"it beside {METADATA}"))
    size = path.stat().st_size
    if size != metadata.tensors_bytes:
        hint = "the file is truncated or was replaced; copy the checkpoint again"
        raise ValueError(message("load", path.name, f"{size} bytes", f"{metadata.tensors_bytes}", hint))
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(message("load", path.name, f"no safetensors ({error})", "safetensors")) from error
    for key, target in metadata.aliases.items():
        if target not in state:
            raise ValueError(message("load", f"alias {key}", f"the missing key {target}", "a key of the file"))
        state[key] = state[target]
    return state


def _build_modules(metadata: Metadata, model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, Int8Attention]]:
    """The compressed modules by path, empty, and the attention to attach by the path of the module that gets it.

    A shared module stands at several paths; a compressed module that stands in another is put there and not listed.
    """
    places = dict(model.named_modules(remove_duplicate=False))
    able = {m for m, reason in interface_modules(model).items() if reason is None}
    built: dict[str, nn.Module] = {}
    replacements: dict[str, nn.Module] = {}
    attentions: dict[str, Int8Attention] = {}
    specs: dict[str, Spec] = {}
    hint = "is it the architecture that was saved?"
    for name, spec in metadata.modules.items():
        parent, _, child = name.rpartition(".")
        attaches = child == CHILD and places.get(parent) in able
        if name == "" or not (attaches or name in places):
            raise ValueError(message("load", "model", f"no module {name!r}", "one to replace there", hint))
        if isinstance(spec, str) and spec not in built:
            raise ValueError(message("load", f"module {name}", f"a reference to {spec!r}", "a module before it"))
        specs[name] = specs[spec] if isinstance(spec, str) else spec
        wrong = None if attaches else mismatch(places[name], specs[name])
        if wrong is not None:
            raise ValueError(message("load", f"model.{name}", *wrong, hint))
        module = built[name] = built[spec] if isinstance(spec, str) else build(specs[name])
        # An activation that the model's layer has taken is gone from the model.
        if not attaches and isinstance(module, QuantizedLinear | SparseLinear):
            module.fused_activation = getattr(places[name], "fused_activation", "none")
        module.train((places[parent] if attaches else places[name]).training)
        if attaches and isinstance(module, Int8Attention):
            attentions[parent] = module
        elif parent in built:
            setattr(built[parent], child, module)
        else:
            replacements[name] = module
            places |= {f"{name}.{inner}": m for inner, m in module.named_modules(remove_duplicate=False) if inner}
    return replacements, attentions


def _check_fit(
    folder: Path, model: nn.Module, replacements: dict[str, nn.Module], state: dict[str, torch.Tensor]
) -> None:
    expected = {
        key: value
        for key, value in model.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in replacements)
    }
    compressed = {f"{name}.{k}": v for name, module in replacements.items() for k, v in module.state_dict().items()}
    expected |= compressed
    problems = [f"missing key {key}" for key in expected if key not in state]
    problems += [f"unexpected key {key}" for key in state if key not in expected]
    for key in [key for key in expected if key in state]:
        got, want = state[key], expected[key]
        if got.shape != want.shape:
            problems.append(f"shape of {key}: got {list(got.shape)}, expected {list(want.shape)}")
        # What is not compressed may be of another float type than the model, which then takes the checkpoint's.
        exact = key in compressed or not want.is_floating_point()
        if got.dtype != want.dtype if exact else not got.is_floating_point():
            problems.append(f"dtype of {key}: got {got.dtype}, expected {want.dtype}")
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ValueError(f"load: {folder}: does not fit the model: {'; '.join(problems[:5])}{more}")


def _fill_sparse(replacements: dict[str, nn.Module], state: dict[str, torch.Tensor]) -> set[str]:
    """Loads the sparse layers, before the model is touched: that an index is sound shows when it is unpacked.

    Returns:
        The keys of what they hold.
    """
    keys: dict[nn.Module, list[str]] = {}
    filled: set[str] = set()
    for place, replacement in replacements.items():
        for inner, module in replacement.named_modules(remove_duplicate=False):
            if not isinstance(module, SparseLinear):
                continue
            name = f"{place}.{inner}".rstrip(".")
            if module not in keys:
                keys[module] = list(module.state_dict())
                try:
                    module.load_state_dict({key: state[f"{name}.{key}"] for key in keys[module]}, assign=True)
                except RuntimeError as error:
                    got = f"a damaged weight ({' '.join(str(error).split())})"
                    raise ValueError(message("load", f"module {name}", got, "a whole one")) from error
            filled |= {f"{name}.{key}" for key in keys[module]}
    return filled


def _share_tied(model: nn.Module, metadata: Metadata) -> None:
    """Modules that share a weight in the file hold one kernel layout of it."""
    for key, target in metadata.aliases.items():
        if key.endswith(".weight_packed"):
            pair = [model.get_submodule(k.rpartition(".")[0]) for k in (target, key)]
            share_kernel_layout([m for m in pair if isinstance(m, PackedModule)])


def _install(
    model: nn.Module,
    replacements: dict[str, nn.Module],
    state: dict[str, torch.Tensor],
    filled: set[str],
    metadata: Metadata,
) -> None:
    for name, module in replacements.items():
        parent, _, child = name.rpartition(".")
        model.get_submodule(parent)._modules[child] = carry(model.get_submodule(name), module)
    # assign: the tensors of the file take the place of the model's, so that a bfloat16 checkpoint stays bfloat16
    others = {key: value for key, value in state.items() if key not in filled}
    model.load_state_dict(others, strict=not filled, assign=True)
    _share_tied(model, metadata)
    first: dict[int, nn.Parameter] = {}
    for key, parameter in model.named_parameters(remove_duplicate=False):
        if key in state:  # assigning made a parameter of its own of each key; those that share a tensor are tied again
            parent, _, child = key.rpartition(".")
            model.get_submodule(parent)._parameters[child] = first.setdefault(id(state[key]), parameter)
    for key, buffer in model.named_buffers():
        if key in metadata.buffer_dtypes:
            parent, _, child = key.rpartition(".")
            model.get_submodule(parent)._buffers[child] = buffer.to(DTYPES[metadata.buffer_dtypes[key]])
