"""Which tokens of a batch count. Padding, where its attention mask is 0, does not."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

_MASK, _TOKENS = "attention_mask", "input_ids"
#: Added to a score, this and less make it e^-1000 of what it was: zero in every float type.
_HIDDEN = -1000.0
#: In the order of the arguments; bool [B, S], True for what counts.
Masks = tuple[torch.Tensor, ...]
_running: ContextVar[Masks] = ContextVar("masks of the running batch", default=())


def named(batch: Any, parameters: Sequence[str]) -> dict[str, Any]:
    """The tensors of a batch by the names of a forward's parameters; a single tensor is the first one."""
    if isinstance(batch, Mapping):
        return {str(name): value for name, value in batch.items()}
    values = batch if isinstance(batch, tuple | list) else (batch,)
    return dict(zip(parameters, values, strict=False))


def as_mask(value: Any) -> torch.Tensor | None:
    """bool [B, S] of an attention mask, or None where it is none of that kind.

    It is one of integers or bools, not 0 for what counts; of floats that are 0 or 1, likewise; or of floats that are
    added to scores, 0 for what counts and a large negative number or minus infinity for padding. Floats that are 0
    alone could be either, and say nothing.
    """
    if not isinstance(value, torch.Tensor) or value.dim() != 2:
        return None
    if not value.is_floating_point():
        return value != 0
    if not value.any():
        return None
    if ((value == 0) | (value == 1)).all():
        return value == 1
    return value == 0 if ((value == 0) | (value <= _HIDDEN)).all() else None


def token_masks(model: nn.Module, batch: Any) -> Masks:
    """The masks of a batch that leave out some token: what its arguments "…attention_mask" say.

    In a model with an encoder and a decoder each has its own. A layer's inputs are told apart by their length S; where
    two masks have one shape, a token that either leaves counts. Tokens "…input_ids" without a mask of their own, and
    labels, of which an encoder-decoder makes its decoder's tokens, all count.
    """
    parameters = () if isinstance(batch, Mapping) else tuple(inspect.signature(model.forward).parameters)
    given = named(batch, parameters)
    masks = {name.removesuffix(_MASK): as_mask(value) for name, value in given.items() if name.endswith(_MASK)}
    if all(mask is None or bool(mask.all()) for mask in masks.values()):
        return ()
    unmasked = [v for name, v in given.items() if name.endswith(_TOKENS) and name.removesuffix(_TOKENS) not in masks]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_" not in masks:
        unmasked.append(given.get("labels"))
    whole = [torch.ones_like(v, dtype=torch.bool) for v in unmasked if isinstance(v, torch.Tensor) and v.dim() == 2]
    by_shape: dict[torch.Size, torch.Tensor] = {}
    for mask in [*masks.values(), *whole]:
        if mask is not None:
            by_shape[mask.shape] = by_shape.get(mask.shape, torch.zeros_like(mask)) | mask
    return tuple(mask for mask in by_shape.values() if not mask.all())


@contextmanager
def counting(masks: Masks) -> Iterator[None]:
    """Within, `counted` goes by these masks."""
    token = _running.set(masks)
    try:
        yield
    finally:
        _running.reset(token)


def running_masks() -> Masks:
    """Those of the batch on which `calibrate.run` is running a model, for what is computed with its tensors later."""
    return _running.get()


def token_mask(x: torch.Tensor, masks: Masks | None = None) -> torch.Tensor | None:
    """The mask for a tensor of tokens, over its first dimension or two: [B, S, …], or [B·S, K]. None where all count,
    or where it is of another shape: a pooled output, tokens that were sent to an expert.

    Args:
        masks: by default those of the running batch.
    """
    for mask in _running.get() if masks is None else masks:
        if x.dim() > 2 and x.shape[:2] == mask.shape:
            return mask.to(x.device)
        if x.dim() == 2 and x.shape[0] == mask.numel():
            return mask.flatten().to(x.device)
    return None


def counted(x: torch.Tensor, masks: Masks | None = None) -> torch.Tensor:
    """The tokens that count, [R, …]; the tensor itself where all do. Arguments as of `token_mask`."""
    mask = token_mask(x, masks)
    return x if mask is None else x[mask]


def pads(tokens: torch.Tensor, pad: int) -> bool:
    """Whether a row of token ids [B, S] begins or ends with two padding tokens: one alone may be the end of a text."""
    ends = (tokens[:, :2], tokens[:, -2:])
    return tokens.shape[1] > 2 and any(bool((end == pad).all(1).any()) for end in ends)
