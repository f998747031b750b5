"""Recipes worth trying on a model, and why."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tcompress.advisor.profile import Profile
from tcompress.quantize.scheme import SCHEMES
from tcompress.recipe import Recipe
from tcompress.report.report import Report

#: A model with this part of zeros in its linear layers was pruned.
PRUNED = 0.3
#: Up to so many tokens a call a linear layer's time is that of reading its weight.
FEW_TOKENS = 16
#: Layers this many decibels worse than the median of a model are its sensitive ones.
SENSITIVE_DB = 3.0


@dataclass(frozen=True)
class Candidate:
    """A recipe to try.

    Attributes:
        name: in tables.
        recipe: to be applied.
        why: for which reason it is tried.
    """

    name: str
    recipe: Recipe
    why: str


def candidates(profile: Profile, with_data: bool) -> list[Candidate]:
    """The recipes that suit a model by its numbers, the one most likely to be taken first.

    Args:
        with_data: there are samples that algorithms can decide by.
    """
    found = [_preset("int8", "eight bits: little is lost, and every kernel here has them")]
    if profile.zeros >= PRUNED:
        why = f"{profile.zeros:.0%} of the linear layers' weights is zero"
        found.insert(0, _preset("sparse-int8", why))
    few = profile.tokens is not None and profile.tokens <= FEW_TOKENS
    why = _bits("W4A8-g32", profile) + (", and few tokens: time is that of reading weights" if few else "")
    found.append(_linear("int4", "W4A8-g32", None, why))
    found.append(_linear("W4A16-g64", "W4A16-g64", None, "four bits of weights, activations as they are"))
    found.append(_floats("int8, float attention", "int8", "what attention in integers brings and costs"))
    if with_data:
        found.append(_linear("int4 gptq", "W4A8-g32", "gptq", "four bits, rounded by what the layers are given"))
        prune = {"step": "prune", "pattern": "8x4", "sparsity": 0.5, "algorithm": "sparsegpt"}
        steps = [prune, *Recipe.load("sparse-int8").model_dump(mode="json", exclude_none=True)["steps"]]
        recipe = Recipe.load({"steps": steps})
        found.append(Candidate("50 % 8x4 + int8", recipe, "half of the blocks, those easiest to do without"))
    return found


def with_sensitive_layers_in_8_bits(candidate: Candidate, report: Report) -> Candidate | None:
    """The same recipe with eight bits for the layers that suffer most, or None where none stands out.

    Args:
        report: of the candidate, made with data: the layers are told by their outputs' errors.
    """
    errors = {
        r.name: r.output_sqnr_db for r in report.compressed if r.output_sqnr_db is not None and r.kind != "Embedding"
    }
    if len(errors) < 4:
        return None
    median = sorted(errors.values())[len(errors) // 2]
    names = [name for name, db in errors.items() if db < median - SENSITIVE_DB]
    if not names:
        return None
    first = {"step": "quantize", "scheme": "int8", "targets": names, "ignore": []}
    content = candidate.recipe.model_dump(mode="json", exclude_none=True)
    recipe = Recipe.load({**content, "steps": [first, *content["steps"]]})
    shown = ", ".join(sorted(names, key=lambda name: errors[name])[:3])
    why = f"eight bits for the {len(names)} of {len(errors)} layers that suffer most, such as {shown}"
    return Candidate(f"{candidate.name}, sensitive in 8 bits", recipe, why)


def _bits(scheme: str, profile: Profile) -> str:
    """What a weight takes under a scheme with groups, scales included, and what it takes now."""
    weights = SCHEMES[scheme].weights
    bits = weights.bits + {"float16": 16, "float32": 32}[weights.scale_dtype] / (weights.group_size or math.inf)
    return f"{bits:g} bits a weight" + (f" in place of {profile.bits:g}" if profile.bits else "")


def _preset(name: str, why: str) -> Candidate:
    return Candidate(name, Recipe.load(name), why)


def _linear(name: str, scheme: str, algorithm: str | None, why: str) -> Candidate:
    """Linear layers by a scheme; embeddings and attention as in the preset int8."""
    layers: dict[str, Any] = {"step": "quantize", "scheme": scheme} | ({"algorithm": algorithm} if algorithm else {})
    table = {"step": "quantize", "scheme": "W8A16", "targets": ["Embedding"]}
    return Candidate(name, Recipe.load({"steps": [layers, table, {"attention": "auto"}]}), why)


def _floats(name: str, scheme: str, why: str) -> Candidate:
    """Linear layers and embeddings alone."""
    table = {"step": "quantize", "scheme": "W8A16", "targets": ["Embedding"]}
    return Candidate(name, Recipe.load({"steps": [{"step": "quantize", "scheme": scheme}, table]}), why)


def checked(given: Sequence[Any]) -> list[Candidate]:
    """Candidates of the user's: recipes of any kind that `Recipe.load` reads, or candidates."""
    found = []
    for i, item in enumerate(given):
        if isinstance(item, Candidate):
            found.append(item)
        else:
            name = item if isinstance(item, str) else f"recipe {i + 1}"
            found.append(Candidate(name, Recipe.load(item), "asked for"))
    return found
