"""The user's data as batches that a model can be run on, with what was left out or clipped counted."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import nn

from tcompress import calibrate
from tcompress.activations import tensors_in
from tcompress.errors import CompressionWarning, message
from tcompress.padding import as_mask, named, pads

#: Under these names configurations keep how many positions a model has.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")
#: A tokenizer of `transformers` that knows no length says 10³⁰.
_NO_LENGTH = 10**9


class Samples:
    """Batches, cleaned as they are read; `notes` says what that changed.

    The rules: text becomes token ids, one sample a text, so that there is no padding. A sample with an empty tensor, or
    with NaN or infinity in a float tensor, is left out. A mask may hold minus infinity: what has "mask" in its name (a
    positional argument has that of the model's forward), or holds nothing but that and zeros. Token ids [B, S] longer
    than the model has positions, or than `max_length`, are clipped to that, and every tensor [B, S] beside them with
    them; the tokens of an encoder and a decoder each by their own length S.
    Padding counts in no statistics and no distance: what an attention mask [B, S] says is none of the text
    (`padding.token_masks`). A sample whose mask leaves nothing is left out. Where a mask is of another kind, or token
    ids hold the configuration's padding token and there is no mask, all tokens count, and `notes` says so.
    (Tokens with NaN or infinity inside of the model are left out layer by layer: `InputStatistics`.)

    Args:
        data: a tensor, a mapping, a tuple, a text, or an iterable of these, such as a DataLoader.
        model: that will be run.
        tokenizer: for text; called as those of `transformers` are.
        max_length: in tokens; the tokenizer's `model_max_length` where it has one.

    Raises:
        TypeError: text without a tokenizer. ValueError: later, when read: no batches, or none that can be used.
    """

    def __init__(
        self,
        data: Any,
        model: nn.Module,
        tokenizer: Callable[..., Mapping[str, Any]] | None = None,
        max_length: int | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(message("compress", "max_length", max_length, "at least 1"))
        if tokenizer is not None and not callable(tokenizer):
            hint = "transformers.PreTrainedTokenizerFast(tokenizer_object=...) wraps one of the package tokenizers"
            raise TypeError(message("compress", "tokenizer", type(tokenizer).__name__, "a callable", hint))
        self.data, self.tokenizer, self.max_length = data, tokenizer, max_length
        limits = (max_length or _length_of(tokenizer), _positions_of(model))
        self._positions = min((limit for limit in limits if limit is not None), default=None)
        self._parameters = list(inspect.signature(model.forward).parameters)
        self._accepted = _keywords_of(model)
        self._pad = _pad_of(model)
        self._reset()

    def _reset(self) -> None:
        self._read = self._left_out = self._clipped = self._hidden = self._other_masks = self._no_mask = 0

    def __iter__(self) -> Iterator[Any]:
        self._reset()
        data = [self.data] if isinstance(self.data, str) else self.data
        for batch in calibrate.batches(data):
            for sample in self._tokenized(batch) if _is_text(batch) else (batch,):
                self._read += 1
                sample = self._short_enough(sample)
                if not self._is_usable(sample):
                    self._left_out += 1
                elif self._is_hidden(sample):
                    self._hidden += 1
                else:
                    yield sample
        if self._left_out + self._hidden == self._read:
            got = f"{self._read} samples that are empty or hold NaN or infinity"
            got += ", or are padding alone" if self._hidden else ""
            raise ValueError(message("compress", "data", got, "at least one without"))

    def read(self, where: str) -> list[Any]:
        """All samples; warns of what was left out or clipped in the name of the function `where`."""
        samples = list(self)
        for note in self.notes:
            warnings.warn(f"{where}: {note}", CompressionWarning, stacklevel=3)
        return samples

    @property
    def notes(self) -> list[str]:
        """What the last reading left out or clipped."""
        found = []
        if self._left_out:
            found.append(
                f"{self._left_out} of {self._read} calibration samples left out: empty, or with NaN or infinity"
            )
        if self._clipped:
            found.append(f"{self._clipped} of {self._read} calibration samples clipped to {self._positions} tokens")
        of = f"of {self._read} calibration samples"
        if self._hidden:
            found.append(f"{self._hidden} {of} left out: their attention mask leaves no token")
        if self._other_masks:
            what = "a mask that is not [B, S] of ones and zeros, or of zeros and -inf, named attention_mask"
            found.append(f"{self._other_masks} {of} with {what}: all their tokens count")
        if self._no_mask:
            found.append(f"{self._no_mask} {of} with padding and no attention_mask: all their tokens count")
        return found

    def _tokenized(self, texts: Any) -> Iterator[Any]:
        if self.tokenizer is None:
            raise TypeError(message("compress", "data", "text", "tensors, or text and tokenizer="))
        for text in [texts] if isinstance(texts, str) else texts:
            # Longer ones are clipped and counted here; without `verbose` the tokenizer would warn of each too.
            encoded = self.tokenizer(text, return_tensors="pt", verbose=False)
            yield {k: v for k, v in encoded.items() if self._accepted is None or k in self._accepted}

    def _is_usable(self, sample: Any) -> bool:
        if not isinstance(sample, tuple | list):
            return _usable(sample)
        names = self._parameters[: len(sample)]
        return all(_usable(item, name) for item, name in zip_longest(sample, names, fillvalue=""))

    def _is_hidden(self, sample: Any) -> bool:
        """Whether a mask hides all of a sample; takes down what no mask tells."""
        given = named(sample, self._parameters)
        masks = {name: value for name, value in given.items() if name.endswith(("attention_mask", "padding_mask"))}
        masks = {name: value for name, value in masks.items() if isinstance(value, torch.Tensor)}
        usable = {name: as_mask(value) for name, value in masks.items()}
        if any(mask is None or name.endswith("padding_mask") for name, mask in usable.items()):
            self._other_masks += 1
        elif self._pad is not None and not masks:
            tokens = (v for n, v in given.items() if n.endswith("input_ids") and isinstance(v, torch.Tensor))
            self._no_mask += any(pads(ids, self._pad) for ids in tokens if ids.dim() == 2)
        return any(n.endswith("attention_mask") and m is not None and not m.any() for n, m in usable.items())

    def _short_enough(self, sample: Any) -> Any:
        if self._positions is None:
            return sample
        tokens = [t for t in tensors_in(sample) if t.dim() == 2 and not t.is_floating_point()]
        too_long = {t.shape[1] for t in tokens if t.shape[1] > self._positions}
        if not too_long:
            return sample
        self._clipped += 1
        return _clipped(sample, too_long, self._positions)


def _positions_of(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for name in _POSITIONS:
        positions = getattr(config, name, None)
        if isinstance(positions, int) and positions > 0:
            return max(positions - _reserved(model, positions), 1)
    return None


def _reserved(model: nn.Module, positions: int) -> int:
    """How many of the positions no token gets: RoBERTa and its kin number tokens from `padding_idx` + 1 on."""
    for name, module in model.named_modules():
        own = name.rpartition(".")[2]
        if isinstance(module, nn.Embedding) and "pos" in own and module.num_embeddings == positions:
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def _pad_of(model: nn.Module) -> int | None:
    pad = getattr(getattr(model, "config", None), "pad_token_id", None)
    return pad if isinstance(pad, int) else None


def _length_of(tokenizer: Any) -> int | None:
    length = getattr(tokenizer, "model_max_length", None)
    return length if isinstance(length, int) and 0 < length < _NO_LENGTH else None


def _keywords_of(model: nn.Module) -> set[str] | None:
    """Names that a model's forward takes, None for any."""
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return set(parameters)


def _is_text(batch: Any) -> bool:
    if isinstance(batch, str):
        return True
    return isinstance(batch, list | tuple) and bool(batch) and all(isinstance(item, str) for item in batch)


def _usable(sample: Any, name: str = "") -> bool:
    """Whether nothing in it is empty, NaN or infinite, except for the minus infinity of a mask."""
    if isinstance(sample, Mapping):
        return all(_usable(item, str(key)) for key, item in sample.items())
    if isinstance(sample, tuple | list):
        return all(_usable(item, name) for item in sample)
    if not isinstance(sample, torch.Tensor):
        return True
    if sample.numel() == 0:
        return False
    if not sample.is_floating_point():
        return True
    finite, masked = torch.isfinite(sample), torch.isneginf(sample)
    if bool(finite.all()):
        return True
    if not finite.any() or not (finite | masked).all():  # a mask that leaves nothing is none
        return False
    return "mask" in name or not bool(sample[finite].any())


def _clipped(value: Any, too_long: set[int], to: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:, :to] if value.dim() == 2 and value.shape[1] in too_long else value
    if isinstance(value, Mapping):
        return {key: _clipped(item, too_long, to) for key, item in value.items()}
    return type(value)(_clipped(item, too_long, to) for item in value) if type(value) in (tuple, list) else value
