"""Which modules a step means, and why some of them stay as they are."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from tcompress.errors import message
from tcompress.nn import CodebookLinear, OutlierLinear, QuantizedEmbedding, QuantizedLinear, SparseLinear
from tcompress.ops.int8_linear import MAX_K
from tcompress.ops.quantize_per_token import FLOAT_DTYPES
from tcompress.packing import PackedWeight
from tcompress.quantize.observers import InputScale
from tcompress.quantize.scheme import Scheme
from tcompress.recipe import Quantize, Recipe, Sparse, Step
from tcompress.weights import is_conv1d, is_masked_by_torch, linear_weight, weight_id

COMPRESSED = (QuantizedLinear, QuantizedEmbedding, SparseLinear, OutlierLinear, CodebookLinear)


@dataclass(frozen=True)
class Match:
    """A module that a step replaces. `names` are all its paths in the model; it is replaced at each of them."""

    names: tuple[str, ...]
    module: nn.Module
    step: Quantize | Sparse
    #: What a pruning step keeps, bool [N, K], or None for all.
    mask: torch.Tensor | None = None
    #: What an algorithm with data has found (`solve`): the weight [N, K], or its integers.
    solved: torch.Tensor | PackedWeight | None = None
    #: A corrected bias, and the inputs that stay in floating point (`layer_job.Solution`), or None.
    bias: torch.Tensor | None = None
    outliers: torch.Tensor | None = None
    #: What quantizes its inputs where the scheme is static. Without, each token has a scale of its own.
    input_scale: InputScale | None = None

    @property
    def scheme(self) -> Scheme | None:
        """Of the step; None keeps floats."""
        scheme = self.step.scheme
        if scheme is not None and scheme.static and self.input_scale is None:
            return scheme.with_dynamic_activations()
        return scheme

    @property
    def weight(self) -> torch.Tensor:
        """[N, K], as it is to be stored or to be quantized; without a gradient's history."""
        if isinstance(self.solved, torch.Tensor):
            return self.solved.detach()
        weight = linear_weight(self.module).detach()
        return weight if self.mask is None else weight.masked_fill(~self.mask, 0)


@dataclass(frozen=True)
class Skip:
    """A module that a step targets and that stays as it is, with the reason."""

    names: tuple[str, ...]
    module: nn.Module
    reason: str


def pattern_matches(pattern: str, name: str, module: nn.Module) -> bool:
    """Whether a pattern of a step means this module; the language is described at `recipe.Step.targets`."""
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    if any(cls.__name__ == pattern for cls in type(module).__mro__):
        return True
    return fnmatch.fnmatchcase(name, pattern) or name.rpartition(".")[2] == pattern


def match(
    model: nn.Module,
    recipe: Recipe,
    converted: Mapping[nn.Module, nn.Module] | None = None,
    required: bool = True,
    other_skips: Sequence[Skip] = (),
    masks: Mapping[nn.Module, torch.Tensor | float] | None = None,
) -> tuple[list[Match], list[Skip]]:
    """Finds the linear layers and embeddings that the recipe's steps replace, in the order of the model.

    Args:
        converted: modules of which others will take the place (`match_attention`); what counts is what these hold.
        required: raise if there is none.
        other_skips: what the error names where there is nothing of its own to name.
        masks: what pruning steps keep, or which part of a weight they will set to zero, where that waits for data.

    Raises:
        ValueError: a pattern is not a regular expression, nothing is left to replace, or the model is compressed.
    """
    names = module_names(model, converted or {})
    head = output_embeddings(model)

    matches: list[Match] = []
    skips: list[Skip] = []
    for module, paths in names.items():
        if isinstance(module, COMPRESSED):
            skips.append(Skip(tuple(paths), module, "already compressed"))
            continue
        if not has_own_weight(module):
            continue
        reasons: list[str] = []  # a step that leaves a module leaves it to the later ones
        for step in recipe.steps:
            if not isinstance(step, Quantize | Sparse) or (isinstance(step, Quantize) and step.scheme is None):
                continue
            if not any_matches(step.targets, paths, module):
                continue
            mask = (masks or {}).get(module)
            match = Match(tuple(paths), module, step, mask if isinstance(mask, torch.Tensor) else None)
            reason = ignored(step, paths, module, head) or why_not(module, step.scheme)
            reason = reason or _without_inputs(match) or _too_dense(match, mask if isinstance(mask, float) else None)
            if reason is None:
                matches.append(match)
                break
            reasons.append(reason)
        else:
            if reasons:
                skips.append(Skip(tuple(paths), module, reasons[0]))
    matches, tied = _without_tied(model, matches)
    skips += tied
    if not matches and required:
        raise ValueError(_nothing_matched(model, recipe, skips or list(other_skips)))
    return matches, skips


#: Targets that presets have, whether a model has such modules or not.
_USUAL = {"Linear", "Conv1D", "Embedding", "*", "lm_head"}


def unmatched(model: nn.Module, recipe: Recipe, converted: Mapping[nn.Module, nn.Module]) -> list[str]:
    """What there is to say of patterns that mean no module of the model, misspelt ones for example."""
    names = module_names(model, converted)
    found: dict[str, None] = {}
    for step in recipe.steps:
        for field, patterns in (("targets", step.targets), ("ignore", step.ignore)):
            unknown = [
                pattern
                for pattern in patterns
                if pattern not in _USUAL and not any(any_matches((pattern,), p, module) for module, p in names.items())
            ]
            if unknown:
                found[f"{step.step}: {field} {unknown} match nothing in the model"] = None
    return list(found)


def why_not(module: nn.Module, scheme: Scheme | None) -> str | None:
    """The reason why this module has no compressed form under `scheme`, or with its floats, or None."""
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "torch.nn.MultiheadAttention reads its weight and never calls it; a step with attention changes that"
    if parametrize.is_parametrized(module):
        return "it is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes its weight plain"
    if module._forward_hooks or (module._forward_pre_hooks and not is_masked_by_torch(module)):
        return "it has forward hooks, which a replacement would lose; remove them (remove_weight_norm, …) first"
    if isinstance(module, nn.Linear):
        base: type[nn.Module] = nn.Linear
    elif isinstance(module, nn.Embedding):
        base = nn.Embedding
    elif is_conv1d(module):
        base = type(module)
    else:
        return f"{type(module).__name__} has no quantized form"
    if type(module).forward is not base.forward:
        return f"{type(module).__name__} has a forward of its own"
    weight = module.weight
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return f"its weight is {getattr(weight, 'dtype', type(weight).__name__)}, not a float tensor"
    if weight.device.type == "meta":
        return "its weight is on the meta device: load the checkpoint first"
    if isinstance(module, nn.Embedding):
        if scheme is None:
            return "an embedding is looked up, not multiplied: zeros bring nothing"
        if scheme.activations is not None:
            return f"{scheme.name} quantizes activations and an embedding has none; use W8A16"
        if module.max_norm is not None:
            return "max_norm changes the table at every call"
        return "quantizing would not make it smaller" if module.embedding_dim < 2 else None
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}, and int8_linear takes float32, bfloat16 or float16"
    if scheme is not None and scheme.activations is None and scheme.weights.bits > 4:
        return f"{scheme.name} leaves activations in floating point, which linear layers do with 4-bit weights only"
    k = weight.shape[0] if is_conv1d(module) else weight.shape[1]
    if scheme is not None and k > MAX_K:
        return f"in_features {k} is above {MAX_K}: an int32 sum could overflow"
    return None if weight.numel() else "its weight is empty"


def _without_inputs(match: Match) -> str | None:
    """Why an algorithm that decides by a layer's inputs leaves it, or None."""
    if isinstance(match.step, Quantize) and match.step.needs_data and isinstance(match.module, nn.Embedding):
        return f"{match.step.algorithm} decides by a layer's inputs, and an embedding is looked up; use rtn"
    return None


def _too_dense(match: Match, planned: float | None) -> str | None:
    """Why a sparse step leaves a layer, which will have a `planned` part of zeros if that is known, or None."""
    if not isinstance(match.step, Sparse) or match.step.min_sparsity == 0:
        return None
    zeros = float((match.weight == 0).float().mean()) if planned is None else planned
    least = match.step.min_sparsity
    return None if zeros >= least else f"{zeros:.0%} of its weight is zero, and the step asks for {least:.0%}"


def module_names(model: nn.Module, converted: Mapping[nn.Module, nn.Module]) -> dict[nn.Module, list[str]]:
    """All paths of each module, in the order of the model; in converted ones the paths to be."""
    names: dict[nn.Module, list[str]] = {}
    gone = {child for module in converted for child in module.children()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in gone:
            names.setdefault(module, []).append(name)
        for child_name, child in converted[module].named_children() if module in converted else ():
            names.setdefault(child, []).append(f"{name}.{child_name}".lstrip("."))
    return names


def has_own_weight(module: nn.Module) -> bool:
    return (
        "weight" in module._parameters
        or parametrize.is_parametrized(module)
        or isinstance(vars(module).get("weight"), torch.Tensor)  # prune, weight_norm: computed by a hook
    )


def any_matches(patterns: tuple[str, ...], names: list[str], module: nn.Module) -> bool:
    try:
        return any(pattern_matches(p, name, module) for p in patterns for name in names)
    except re.error as error:
        raise ValueError(message("match", "pattern", error.pattern, "a regular expression", str(error))) from error


def ignored(step: Step, names: list[str], module: nn.Module, head: nn.Module | None) -> str | None:
    for pattern in step.ignore:
        if any_matches((pattern,), names, module):
            return f"ignored by {pattern!r}"
        if pattern == "lm_head" and module is head:
            return "ignored by 'lm_head': it is the output embeddings"
    return None


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """What `transformers` calls the head over the vocabulary, under whatever name."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def parameters_outside(model: nn.Module, modules: Collection[nn.Module]) -> dict[int, list[str]]:
    """Names by `id` of the parameters that modules other than these hold."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if module not in modules:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    users.setdefault(id(parameter), []).append(f"{name}.{key}")
    return users


def _without_tied(model: nn.Module, matches: list[Match]) -> tuple[list[Match], list[Skip]]:
    """Leaves out modules whose weight is also used by a module that stays: replacing them would store it twice."""
    users = parameters_outside(model, {m.module for m in matches})
    kept, skipped = [], []
    for m in matches:
        tied = users.get(weight_id(m.module))
        if tied:
            reason = f"its weight is also {', '.join(tied)}, which stays: a quantized copy would only add bytes"
            skipped.append(Skip(m.names, m.module, reason))
        else:
            kept.append(m)
    return kept, skipped


def _nothing_matched(model: nn.Module, recipe: Recipe, skips: list[Skip]) -> str:
    if skips and all(s.reason == "already compressed" for s in skips):
        return message("compress", "model", "a model that is already compressed", "one with layers to compress")
    targets = sorted({t for step in recipe.steps for t in step.targets})
    classes = sorted({type(m).__name__ for m in model.modules()})
    reasons = "".join(f"\n  {s.names[0] or '(root)'}: {s.reason}" for s in skips[:10])
    hint = f"its classes are {', '.join(classes)}" + (f"; skipped:{reasons}" if reasons else "")
    return message("compress", "recipe", f"targets {targets} that match nothing", "at least one layer", hint)
