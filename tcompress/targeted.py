"""Which linear layers a transform means, and what the report says of one that it replaced."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from tcompress.distances import sqnr_db, squared_errors
from tcompress.fast_path import disable_torch_fast_path
from tcompress.match import (
    Skip,
    any_matches,
    has_own_weight,
    ignored,
    module_names,
    output_embeddings,
    parameters_outside,
    why_not,
)
from tcompress.recipe import Step
from tcompress.report.report import LayerReport
from tcompress.report.size import model_sizes
from tcompress.weights import linear_weight, weight_id


def target_layers(
    model: nn.Module, step: Step, converted: Mapping[nn.Module, nn.Module] | None = None
) -> tuple[dict[nn.Module, tuple[str, ...]], list[Skip]]:
    """The linear layers that a step targets, with all their names, and those that it leaves, with the reason.

    A layer whose weight is also that of a module which stays (a tied embedding) is left: it would be stored twice.

    Args:
        converted: as for `match.match`.
    """
    found: dict[nn.Module, tuple[str, ...]] = {}
    skips: list[Skip] = []
    head = output_embeddings(model)
    for module, paths in module_names(model, converted or {}).items():
        if not has_own_weight(module) or not any_matches(step.targets, paths, module):
            continue
        looked_up = "an embedding is looked up, not multiplied" if isinstance(module, nn.Embedding) else None
        itself = "it is the whole model, not a part of it" if module is model else None
        reason = ignored(step, paths, module, head) or looked_up or why_not(module, None) or itself
        if reason is None:
            found[module] = tuple(paths)
        else:
            skips.append(Skip(tuple(paths), module, reason))
    users = parameters_outside(model, found)
    for module in [module for module in found if weight_id(module) in users]:
        tied = ", ".join(users[weight_id(module)])
        skips.append(Skip(found.pop(module), module, f"its weight is also {tied}, which stays"))
    return found, skips


def replaced_report(
    names: tuple[str, ...],
    module: nn.Module,
    replacement: nn.Module,
    action: str,
    reason: str = "",
    stored: torch.Tensor | None = None,
) -> LayerReport:
    """Of a linear layer or embedding and what took its place.

    Args:
        stored: [N, K], the weight that the replacement computes with; by default its `weight`.
    """
    weight, stored = linear_weight(module), linear_weight(replacement) if stored is None else stored
    return LayerReport(
        name=names[0],
        aliases=names[1:],
        kind=type(module).__name__,
        action=action,
        reason=reason,
        shape=tuple(weight.shape),
        bytes_before=model_sizes(module).disk,
        bytes_after=model_sizes(replacement).disk,
        sparsity=int((stored == 0).sum()) / max(stored.numel(), 1),
        weight_sqnr_db=sqnr_db(*squared_errors(weight, stored)),
    )


def left_report(skip: Skip) -> LayerReport:
    """Of a module that a step left as it is."""
    nbytes = model_sizes(skip.module).disk
    weight = getattr(skip.module, "weight", None)
    return LayerReport(
        name=skip.names[0],
        aliases=skip.names[1:],
        kind=type(skip.module).__name__,
        action="skipped",
        reason=skip.reason,
        shape=tuple(linear_weight(skip.module).shape) if isinstance(weight, torch.Tensor) else (),
        bytes_before=nbytes,
        bytes_after=nbytes,
    )


def put(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Puts modules in the places of others, at all of them, in place."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replacements:
                parent._modules[name] = replacements[child]
    disable_torch_fast_path(model)
