"""What a distillation loss sees of a model on one batch, found by hooks and not by a table of architectures."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from tcompress.activations import tensors_in
from tcompress.calibrate import first_tensor, run
from tcompress.errors import message
from tcompress.padding import as_mask, named


@dataclass(frozen=True)
class AttentionCall:
    """One call of `torch.nn.functional.scaled_dot_product_attention`.

    Attributes:
        query: [B, H, Sq, D]. key, value: [B, H, Skv, D], repeated where they had fewer heads.
        allowed: bool, broadcasts to [B, H, Sq, Skv]: which keys a query may attend to; None for all.
        bias: float, broadcasts likewise: finite values that are added to the scores, or None.
        scale: of the scores, 1/√D unless the model says otherwise.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    allowed: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float

    @property
    def scores(self) -> torch.Tensor:
        """Q Kᵀ · scale + bias before the softmax, [B, H, Sq, Skv]; not masked."""
        scores = self.query @ self.key.transpose(-1, -2) * self.scale
        return scores if self.bias is None else scores + self.bias


@dataclass
class Seen:
    """A model's forward on one batch.

    Attributes:
        output: the tensor called `logits` where there is one, else the first float tensor, whatever its shape.
        tokens: bool [B, T], False for padding; None where the batch has no `attention_mask`, or no 2-dimensional one.
        hidden: of each chain of blocks (`blocks.find_chains`), the first tensor that each block returned, [B, T, D].
        attention: of each chain and block, its calls of attention.
    """

    output: torch.Tensor
    tokens: torch.Tensor | None
    hidden: list[list[torch.Tensor]] = field(default_factory=list)
    attention: list[list[list[AttentionCall]]] = field(default_factory=list)


def see(model: nn.Module, batch: Any, chains: Sequence[Sequence[nn.Module]], attention: bool = False) -> Seen:
    """Runs a model and takes down what losses need.

    Args:
        batch: as for `calibrate.run`; of a mapping, "labels" are not handed to the model.
        chains: of blocks whose outputs are wanted; none if empty.
        attention: whether the calls of attention are wanted too.

    Raises:
        ValueError: the model gives no float tensor.
    """
    hidden: list[list[torch.Tensor]] = [[] for _ in chains]
    calls: list[list[list[AttentionCall]]] = [[] for _ in chains]
    with ExitStack() as stack:
        watch = _AttentionWatch()
        for c, chain in enumerate(chains):
            for block in dict.fromkeys(chain):  # a block that stands at several places is called at each
                stack.callback(block.register_forward_hook(_keep_first(hidden[c])).remove)
                if attention:
                    stack.callback(block.register_forward_pre_hook(watch.begin(calls[c])).remove)
                    stack.callback(block.register_forward_hook(watch.end).remove)
        if attention:
            stack.enter_context(watch)
        result = run(model, without_labels(model, batch))
    return Seen(output_of(result), tokens_of(model, batch), hidden, calls)


def without_labels(model: nn.Module, batch: Any) -> Any:
    """The batch as the model gets it: the losses are computed outside of it. A model with an encoder and a decoder that
    is given no tokens for its decoder makes them from the labels, as it would by itself."""
    if not isinstance(batch, Mapping) or "labels" not in batch:
        return batch
    plain = {k: v for k, v in batch.items() if k != "labels"}
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not decodes or batch["labels"] is None or {"decoder_input_ids", "decoder_inputs_embeds"} & plain.keys():
        return plain
    shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return batch if shifted is None else {**plain, "decoder_input_ids": shifted(labels=batch["labels"])}


def tokens_of(model: nn.Module, batch: Any) -> torch.Tensor | None:
    """bool [B, T] of a batch's `attention_mask`, or None."""
    parameters = () if isinstance(batch, Mapping) else tuple(inspect.signature(model.forward).parameters)
    return as_mask(named(batch, parameters).get("attention_mask"))


def output_of(result: Any) -> torch.Tensor:
    """The tensor that a model is judged by."""
    output = first_tensor(result)
    if output is None:
        raise ValueError(message("distill", "output", type(result).__name__, "a float tensor in it"))
    return output


def _keep_first(kept: list[torch.Tensor]) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        kept.append(next(tensors_in(output)))

    return hook


class _AttentionWatch(TorchFunctionMode):
    """Takes down the arguments of attention while a block runs. Models call the one function of torch, whatever they
    name their projections."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[AttentionCall] | None = None

    def begin(self, blocks: list[list[AttentionCall]]) -> Any:
        """A hook from which on calls are added to a new entry of this list."""

        def hook(*_: Any) -> None:
            self._calls = []
            blocks.append(self._calls)

        return hook

    def end(self, *_: Any) -> None:
        """A hook after which calls are not added."""
        self._calls = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self._calls is not None:
            self._calls.append(_attention_call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _attention_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> AttentionCall:
    if key.shape[-3] != query.shape[-3]:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(repeats, -3) for t in (key, value))
    allowed = bias = None
    if is_causal:
        allowed = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    elif attn_mask is not None and attn_mask.dtype == torch.bool:
        allowed = attn_mask
    elif attn_mask is not None:
        allowed = attn_mask > torch.finfo(attn_mask.dtype).min / 2  # models write -inf or the lowest number
        bias = torch.where(allowed, attn_mask, 0)
    return AttentionCall(query, key, value, allowed, bias, scale or 1 / math.sqrt(query.shape[-1]))
