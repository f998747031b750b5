"""Smaller students made of a teacher: fewer layers, or narrower ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from tcompress.blocks import find_chains
from tcompress.calibrate import evaluating, run
from tcompress.errors import message
from tcompress.replace import copied_model

#: What configurations call the number of their blocks.
_COUNTS = (
    "num_hidden_layers",
    "num_layers",
    "n_layer",
    "n_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)


def student_of(
    teacher: nn.Module, batch: Any, *, every: int | None = None, layers: Sequence[int] | None = None
) -> nn.Module:
    """A copy of a model with some of its blocks, which start with the teacher's weights; Sanh et al., "DistilBERT",
    arXiv 1910.01108, section 3: "taking one layer out of two".

    The blocks are found by running the model (`blocks.find_chains`), in an encoder and a decoder alike. The
    configuration of a `transformers` model says so afterwards, so that the student can be saved and loaded by its own
    class.

    Args:
        teacher: stays as it is.
        batch: any input, as for `compress`.
        every: keep blocks 0, n, 2n …
        layers: or which to keep, from 0, in rising order.

    Returns:
        The student, in the teacher's mode.

    Raises:
        ValueError: both or neither were given, a model that cannot be copied, no blocks were found, there is no such
            block, or the model does not run without those that were left out.
    """
    if (every is None) == (layers is None):
        got = "both" if layers is not None else "neither"
        raise ValueError(message("student_of", "every, layers", got, "one of the two"))
    if every is not None and every < 1:
        raise ValueError(message("student_of", "every", every, "1 or more"))
    hint = "make its weights plain (remove_weight_norm, …) first"
    student = copied_model(teacher, where="student_of", argument="teacher", hint=hint)
    with evaluating(student):
        chains = find_chains(student, batch)
    if not chains:
        hint = "blocks are members of a ModuleList that run one after the other"
        raise ValueError(message("student_of", "teacher", "no sequence of blocks", "at least one", hint))
    kept_of: dict[int, list[int]] = {}  # by the length of a chain
    for chain in chains:
        n = len(chain)
        kept = list(range(0, n, every)) if every is not None else list(layers or ())
        if not kept or kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= n:
            expected = f"some of 0 to {n - 1}, in rising order"
            raise ValueError(message("student_of", "layers", kept, expected))
        _keep(student, chain, kept)
        kept_of[n] = kept
    for config in {id(c): c for m in student.modules() if (c := getattr(m, "config", None)) is not None}.values():
        _shorten(config, kept_of)
    try:
        with evaluating(student):
            run(student, batch)
    except Exception as error:
        got = f"{kept}, without the others the model fails: {error}"
        raise ValueError(message("student_of", "layers", got, "ones that run alone", "keep the first block")) from error
    return student


def _keep(student: nn.Module, chain: list[nn.Module], kept: list[int]) -> None:
    for parent in student.modules():
        for name, blocks in parent._modules.items():
            if isinstance(blocks, nn.ModuleList) and len(blocks) == len(chain) and blocks[0] is chain[0]:
                parent._modules[name] = nn.ModuleList(chain[i] for i in kept)
                if getattr(parent, "num_layers", None) == len(chain):
                    parent.num_layers = len(kept)  # type: ignore[assignment]
    for new, old in enumerate(kept):
        for module in chain[old].modules():
            if isinstance(getattr(module, "layer_idx", None), int):  # the place in a cache of keys and values
                module.layer_idx = new  # type: ignore[assignment]


def _shorten(config: Any, kept_of: Mapping[int, list[int]]) -> None:
    """Writes the new numbers of blocks into a configuration, and keeps what it says of single ones.

    All at once: the new length of one chain may be the old one of another.
    """
    for name, value in list(vars(config).items()):
        if name in _COUNTS and isinstance(value, int) and value in kept_of:
            setattr(config, name, len(kept_of[value]))
        elif "layer" in name and isinstance(value, list) and len(value) in kept_of:
            setattr(config, name, [value[i] for i in kept_of[len(value)]])


def narrower(teacher: nn.Module, *, copy_weights: bool = True, **changes: Any) -> nn.Module:
    """A `transformers` model of the teacher's class whose configuration differs, `hidden_size=192,
    num_attention_heads=6` for one.

    Args:
        copy_weights: start with the leading part of each of the teacher's weights, as large as fits, instead of at
            random: a student so begins nearer to its teacher, whose units of one layer it has in the next one too.
        changes: of the configuration.

    Raises:
        ValueError: no configuration, or none that has such a field.
    """
    config = copy.deepcopy(getattr(teacher, "config", None))
    if config is None or not hasattr(config, "to_dict"):
        got = type(teacher).__name__
        raise ValueError(message("narrower", "teacher", got, "a transformers model", "build the student yourself"))
    for name, value in changes.items():
        if not hasattr(config, name):
            raise ValueError(message("narrower", "changes", name, f"a field of {type(config).__name__}"))
        setattr(config, name, value)
    student: nn.Module = type(teacher)(config)
    if copy_weights:
        given = dict(teacher.named_parameters())
        with torch.no_grad():
            for name, parameter in student.named_parameters():
                if name in given and given[name].dim() == parameter.dim():
                    part = tuple(slice(min(a, b)) for a, b in zip(parameter.shape, given[name].shape, strict=True))
                    parameter[part] = given[name][part].to(parameter)
    first = next(teacher.parameters())
    return student.to(device=first.device, dtype=first.dtype).train(teacher.training)
