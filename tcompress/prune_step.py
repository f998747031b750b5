"""The pruning steps of a recipe: which weights of which layers go."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from tcompress.errors import message
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
from tcompress.packing import Pattern
from tcompress.prune import magnitude_mask
from tcompress.ratios import sparsities_by_magnitude
from tcompress.recipe import Prune, Recipe
from tcompress.weights import linear_weight, weight_id, weight_key


@dataclass(frozen=True)
class Pruned:
    """A layer that a step prunes.

    Attributes:
        mask: bool [N, K], True where a weight stays. None of an algorithm that needs data, until `solve` has seen them.
        weight: [N, K], of an algorithm that changes what stays, or None.
    """

    names: tuple[str, ...]
    step: Prune
    mask: torch.Tensor | None
    weight: torch.Tensor | None = None

    @property
    def zeros(self) -> float:
        """Which part of the weights goes, as the step asks."""
        pattern, sparsity = Pattern.parse(self.step.pattern), self.step.sparsity
        if sparsity is not None:
            return sparsity
        n, m = pattern.size
        return 1 - n / m


def prune_masks(
    model: nn.Module, recipe: Recipe, converted: Mapping[nn.Module, nn.Module]
) -> tuple[dict[nn.Module, Pruned], list[Skip]]:
    """The masks of all pruning steps; a layer that several steps target is pruned by the first.

    Layers with one weight get one mask, the first that is found; a weight that a layer uses which stays as it is stays
    too, for a pruned copy would be one more.

    Raises:
        ValueError: a weight holds NaN or infinity; the message names the layer.
    """
    steps = [step for step in recipe.steps if isinstance(step, Prune)]
    pruned: dict[nn.Module, Pruned] = {}
    skips: list[Skip] = []
    if not steps:
        return pruned, skips
    head = output_embeddings(model)
    by_weight: dict[tuple[int, bool], tuple[Prune, torch.Tensor | None]] = {}
    ranked = {step: sparsities_by_magnitude(model, step, converted) for step in steps if step.scope == "model"}
    for module, names in module_names(model, converted).items():
        for step in steps if has_own_weight(module) else ():
            if not any_matches(step.targets, names, module):
                continue
            reason = ignored(step, names, module, head) or why_not(module, None)
            if reason is not None:
                skips.append(Skip(tuple(names), module, f"not pruned: {reason}"))
                continue
            key = weight_key(module)
            if key not in by_weight:
                own = step.model_copy(update={"sparsity": ranked[step][key]}) if key in ranked.get(step, {}) else step
                try:
                    by_weight[key] = own, _mask(linear_weight(module), own)
                except ValueError as error:
                    raise ValueError(f"compress: {names[0] or '(root)'}: {error}") from error
            pruned[module] = Pruned(tuple(names), *by_weight[key])
            break
    users = parameters_outside(model, pruned)
    for module in [module for module in pruned if weight_id(module) in users]:
        tied = ", ".join(users[weight_id(module)])
        skips.append(Skip(pruned.pop(module).names, module, f"not pruned: its weight is also {tied}, which stays"))
    reasons = {skip.module: skip for skip in reversed(skips) if skip.module not in pruned}  # the first of each
    return pruned, list(reversed(reasons.values()))


def _mask(weight: torch.Tensor, step: Prune) -> torch.Tensor | None:
    """What stays, where a step decides by the weight alone.

    Raises:
        ValueError: the weight holds NaN or infinity.
    """
    if not step.needs_data:
        return magnitude_mask(weight, step.pattern, step.sparsity)
    if not bool(torch.isfinite(weight).all()):  # found before data are run
        raise ValueError(message(step.algorithm, "weight", "NaN or infinity", "finite values"))
    return None
