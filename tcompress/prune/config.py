"""Fits the configuration of a `transformers` model to what it has become, where a configuration can say it.

Which numbers of it mean what is found by building the model without memory: those are right with which it gets the
weights that it has. Where none are, the configuration stays as it is, and a checkpoint of tcompress says the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import nn

_MAX_NUMBERS = 6


def fit_count(model: nn.Module, before: int, kept: Sequence[int]) -> bool:
    """After blocks were taken out: finds the number of blocks, and shortens lists of as many entries.

    Returns:
        Whether it was found.
    """
    config = _config(model)
    if config is None:
        return False
    lists = {
        key: [value[i] for i in kept]
        for key, value in vars(config).items()
        if isinstance(value, list) and len(value) == before
    }
    names = [key for key, value in vars(config).items() if type(value) is int and value == before]
    wanted = set(model.state_dict())
    return _first_that_fits(
        model, ({**lists, name: len(kept)} for name in names), lambda built: set(built.state_dict()) == wanted
    )


def fit_sizes(model: nn.Module, sizes: Sequence[tuple[int, int]]) -> bool:
    """After heads or channels were taken out everywhere: finds the numbers that give the weights their new sizes.

    Args:
        sizes: what may have become what, such as the number of heads.
    """
    config = _config(model)
    if config is None or not sizes:
        return False
    new: dict[int, set[int]] = {}
    for old, left in sizes:
        new.setdefault(old, set()).add(left)
    # A number that became several is none that a configuration could hold.
    able = {old: next(iter(left)) for old, left in new.items() if len(left) == 1}
    changes = {key: able[value] for key, value in vars(config).items() if type(value) is int and value in able}
    wanted = {key: value.shape for key, value in model.state_dict().items()}

    def proposals() -> Iterator[dict[str, Any]]:
        names = list(changes)[:_MAX_NUMBERS]
        for count in range(len(names), 0, -1):
            for chosen in combinations(names, count):
                yield {name: changes[name] for name in chosen}

    return _first_that_fits(
        model, proposals(), lambda built: {k: v.shape for k, v in built.state_dict().items()} == wanted
    )


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    known = type(model).__module__.startswith("transformers.") and hasattr(config, "to_dict")
    return config if known else None


def _first_that_fits(model: nn.Module, proposals: Any, fits: Any) -> bool:
    config = _config(model)
    for changes in proposals:
        trial = copy.deepcopy(config)
        vars(trial).update(changes)
        try:
            with torch.device("meta"):
                built = type(model)(type(config).from_dict(trial.to_dict()))
        except Exception:
            # Each class checks its configuration in its own way, with errors of its own; a number with which the model
            # cannot be built is not the one that is looked for.
            continue
        if fits(built):
            vars(config).update(changes)
            return True
    return False
