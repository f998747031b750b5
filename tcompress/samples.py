"""The user's data as batches that a model can be run on, with what was left out or clipped counted."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tcompress import calibrate
from tcompress.blocks import tensors_in
from tcompress.errors import message

#: Under these names configurations keep how many positions a model has.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_sequence_length")


class Samples:
    """Batches, cleaned as they are read; `notes` says what that changed.

    The rules: text becomes token ids, one sample a text, so that there is no padding. A sample with an empty tensor, or
    with NaN or infinity in a float tensor, is left out (a mask may hold minus infinity). Token ids longer than the
    model has positions, or than `max_length`, are clipped to that, and every tensor [B, S] beside them with them.
    (Tokens with NaN or infinity inside of the model are left out layer by layer: `InputStatistics`.)

    Args:
        data: a tensor, a mapping, a tuple, a text, or an iterable of these, such as a DataLoader.
        model: that will be run.
        tokenizer: for text; called as those of `transformers` are.
        max_length: in tokens.

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
        self._positions = max_length or _positions_of(model)
        self._accepted = _keywords_of(model)
        self._read = self._left_out = self._clipped = 0

    def __iter__(self) -> Iterator[Any]:
        self._read = self._left_out = self._clipped = 0
        data = [self.data] if isinstance(self.data, str) else self.data
        for batch in calibrate.batches(data):
            for sample in self._tokenized(batch) if _is_text(batch) else (batch,):
                self._read += 1
                sample = self._short_enough(sample)
                if _usable(sample):
                    yield sample
                else:
                    self._left_out += 1
        if self._left_out == self._read:
            got = f"{self._read} samples that are empty or hold NaN or infinity"
            raise ValueError(message("compress", "data", got, "at least one without"))

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
        return found

    def _tokenized(self, texts: Any) -> Iterator[Any]:
        if self.tokenizer is None:
            raise TypeError(message("compress", "data", "text", "tensors, or text and tokenizer="))
        for text in [texts] if isinstance(texts, str) else texts:
            # Longer ones are clipped and counted here; without `verbose` the tokenizer would warn of each too.
            encoded = self.tokenizer(text, return_tensors="pt", verbose=False)
            yield {k: v for k, v in encoded.items() if self._accepted is None or k in self._accepted}

    def _short_enough(self, sample: Any) -> Any:
        tensors = list(tensors_in(sample))
        longest = max((t.shape[1] for t in tensors if t.dim() == 2 and not t.is_floating_point()), default=0)
        if self._positions is None or longest <= self._positions:
            return sample
        self._clipped += 1
        return _clipped(sample, longest, self._positions)


def _positions_of(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    for name in _POSITIONS:
        positions = getattr(config, name, None)
        if isinstance(positions, int) and positions > 0:
            return positions
    return None


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
    """Whether nothing in it is empty, NaN or infinite; minus infinity is what a mask holds."""
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
    values = sample.nan_to_num(nan=torch.nan, posinf=torch.inf, neginf=0) if "mask" in name else sample
    return bool(torch.isfinite(values).all())


def _clipped(value: Any, length: int, to: int) -> Any:
    if isinstance(value, torch.Tensor):
        return value[:, :to] if value.dim() == 2 and value.shape[1] == length else value
    if isinstance(value, Mapping):
        return {key: _clipped(item, length, to) for key, item in value.items()}
    return type(value)(_clipped(item, length, to) for item in value) if type(value) in (tuple, list) else value
