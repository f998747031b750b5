"""Builds the compressed form of a module, and puts it in the module's place."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping

import torch
from torch import nn

from tcompress.errors import message
from tcompress.fast_path import disable_torch_fast_path
from tcompress.match import Match
from tcompress.nn import (
    Int8MultiheadAttention,
    OutlierLinear,
    QuantizedEmbedding,
    QuantizedLinear,
    SparseLinear,
)
from tcompress.nn.packed_module import PackedModule, share_kernel_layout
from tcompress.packing import PackedWeight
from tcompress.quantize import QuantArgs
from tcompress.recipe import Sparse
from tcompress.solve_layer import integers
from tcompress.weights import is_conv1d, is_masked_by_torch, linear_bias, linear_weight, weight_key

#: By the weight, whether it is stored transposed, its mask and how it is quantized.
PackedKey = tuple[int, bool, int, QuantArgs]
#: The modules around a quantized weight so far. The integers are theirs: a second copy, in the storage layout, would be
#: as large as the compressed model.
PackedCache = dict[PackedKey, list[PackedModule]]


def packed_key(match: Match) -> PackedKey:
    """Equal for modules that hold the same integers."""
    assert match.scheme is not None
    return (*weight_key(match.module), id(match.mask), match.scheme.weights)


def compressed(match: Match, cache: PackedCache) -> nn.Module:
    """The compressed form of a matched module. Quantized modules with a tied weight share its integers through `cache`.

    Raises:
        ValueError: the weight holds NaN or infinity; the message names the module.
    """
    if isinstance(match.step, Sparse):
        return _sparse(match, match.step)
    module, scheme = match.module, match.scheme
    assert scheme is not None
    modules = cache.setdefault(packed_key(match), [])
    if modules:
        packed = modules[0].packed
    elif isinstance(match.solved, PackedWeight):
        packed = match.solved
    else:
        try:
            packed = integers(match.weight, match.step)
        except ValueError as error:
            raise ValueError(f"compress: {match.names[0] or '(root)'}: {error}") from error
    replacement: PackedModule
    if isinstance(module, nn.Embedding):
        replacement = QuantizedEmbedding.from_packed(packed, scheme, module.weight.dtype, module.padding_idx)
    else:
        bias = linear_bias(module) if match.bias is None else match.bias
        kernel = next((m.held_kernel for m in modules if m.held_kernel is not None), None)
        replacement = QuantizedLinear.from_packed(packed, bias, scheme, kernel=kernel, input_scale=match.input_scale)
    modules.append(replacement)
    share_kernel_layout(modules)
    if match.outliers is not None and isinstance(replacement, QuantizedLinear):
        exact = match.weight[:, match.outliers].to(module.weight.dtype)  # type: ignore[arg-type]
        return OutlierLinear.from_parts(replacement, match.outliers, exact).train(module.training)
    return replacement.train(module.training)


def _sparse(match: Match, step: Sparse) -> SparseLinear:
    module = match.module
    bias = linear_bias(module)
    try:
        layer = SparseLinear.from_weight(match.weight, bias, step.scheme, tokens=step.tokens)
    except ValueError as error:
        raise ValueError(f"compress: {match.names[0] or '(root)'}: {error}") from error
    return layer.train(module.training)


def pruned_copy(
    module: nn.Module, mask: torch.Tensor | None, cache: dict[int, nn.Parameter], weight: torch.Tensor | None = None
) -> nn.Module:
    """A linear layer like this one, with zeros where mask [N, K] is False and nothing of `torch.nn.utils.prune`; if one
    is given, with a weight [N, K] that has them already, and is taken as it is.

    Layers with a tied weight share the pruned one through `cache`.
    """
    memo: dict[int, object] = {}  # deepcopy takes what it holds, and would copy what a weight is a view into
    for name in ("weight", "bias"):
        old = getattr(module, name)
        if old is None:
            continue
        if name == "bias":
            bias = linear_bias(module)
            assert bias is not None
            memo[id(old)] = nn.Parameter(bias.detach().clone(), old.requires_grad)
            continue
        if id(old) not in cache:
            if weight is None:
                assert mask is not None
                weight = linear_weight(module).detach().masked_fill(~mask, 0)
            new = weight
            new = new.t().contiguous() if is_conv1d(module) else new
            cache[id(old)] = nn.Parameter(new, old.requires_grad)
        memo[id(old)] = cache[id(old)]
    copied = copy.deepcopy(module, memo)
    if is_masked_by_torch(module):
        copied._forward_pre_hooks.clear()
        for name in [name for name in ("weight", "bias") if f"{name}_mask" in module._buffers]:
            parameter = vars(copied).pop(name)
            del copied._parameters[f"{name}_orig"], copied._buffers[f"{name}_mask"]
            copied.register_parameter(name, parameter)
    return copied


def assembled(module: Int8MultiheadAttention, replacements: dict[nn.Module, nn.Module]) -> Int8MultiheadAttention:
    """A converted module with its quantized projections; the others get weights of their own, until here views."""
    for name, child in list(module.named_children()):
        if child in replacements:
            setattr(module, name, replacements[child])
        else:
            for parameter in child.parameters():
                parameter.data = parameter.data.clone()
    return module


def check_in_place(model: nn.Module, replaced: Collection[nn.Module]) -> None:
    """Raises ValueError if the model itself is among the modules that are to be replaced in it."""
    if model in replaced:
        hint = "a single layer cannot replace itself; use inplace=False and take the result's model"
        raise ValueError(f"compress: inplace: got True for a model that is one layer, expected False; {hint}")


def swap(model: nn.Module, replacements: dict[nn.Module, nn.Module], *, inplace: bool) -> nn.Module:
    """Returns the model with each key replaced by its value at every place where it stands.

    Not in place: everything else is copied, the replaced modules are not.

    Raises:
        ValueError: in place, and the model itself is to be replaced; or not in place, and it cannot be copied.
    """
    if inplace:
        check_in_place(model, replacements)
        for parent in list(model.modules()):
            for name, child in parent._modules.items():
                if child in replacements:
                    parent._modules[name] = replacements[child]
    else:
        # deepcopy takes what its memo holds instead of copying: no second copy of the replaced weights is made
        model = copied_model(model, {id(old): new for old, new in replacements.items()})
    disable_torch_fast_path(model)
    return model


def copied_model(
    model: nn.Module,
    memo: Mapping[int, object] | None = None,
    *,
    where: str = "compress",
    argument: str = "model",
    hint: str = "or pass inplace=True",
) -> nn.Module:
    """A deep copy, also of a model that `torch.nn.utils.prune` masks and that was called since.

    Args:
        memo: as for `copy.deepcopy`: what stands for an object of this id in the copy.
        where, argument, hint: of the error.

    Raises:
        ValueError: it cannot be copied, as its weights are computed by a hook (`torch.nn.utils.weight_norm`).
    """
    masked: dict[int, object] = {id(value): value.detach().clone() for value in _masked_values(model)}
    try:
        return copy.deepcopy(model, {**masked, **(memo or {})})
    except RuntimeError as error:
        got = f"a model that cannot be copied ({str(error).strip()})"
        raise ValueError(message(where, argument, got, "one that can", hint)) from error


def _masked_values(model: nn.Module) -> Iterator[torch.Tensor]:
    """What `torch.nn.utils.prune` computed for the last call; deepcopy refuses what has a gradient's history."""
    for module in model.modules():
        for name in module._buffers:
            value = vars(module).get(name.removesuffix("_mask"))
            if name.endswith("_mask") and isinstance(value, torch.Tensor):
                yield value
