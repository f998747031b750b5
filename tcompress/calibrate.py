"""Runs a model on the user's data and compares each layer with its replacement, in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcompress.attention_error import AttentionError
from tcompress.distances import PIECE, cosine, finite, sqnr_db, squared_errors
from tcompress.errors import message
from tcompress.integrations.attention_modules import attached
from tcompress.match_attention import AttentionMatch
from tcompress.memory import trim, trimmed_between_blocks
from tcompress.padding import Masks, counted, counting, token_mask, token_masks


def batches(data: Any) -> Iterator[Any]:
    """The batches in `data`: a tensor, a mapping or a tuple is one batch; any other iterable yields them.

    Raises:
        TypeError: not iterable. ValueError: empty.
    """
    if isinstance(data, torch.Tensor | Mapping | tuple):
        data = [data]
    if not isinstance(data, Iterable) or isinstance(data, str):
        expected = "a tensor, a mapping, a tuple or an iterable of these"
        raise TypeError(message("compress", "data", type(data).__name__, expected))
    empty = True
    for batch in data:
        empty = False
        yield batch
    if empty:
        raise ValueError(message("compress", "data", "no batches", "at least one"))


def run(model: nn.Module, batch: Any) -> Any:
    """Calls the model on a batch (`call`); hooks on its modules may ask meanwhile which tokens are padding
    (`padding.counted`)."""
    with counting(token_masks(model, batch)):
        return call(model, batch)


def call(model: nn.Module, batch: Any) -> Any:
    """Calls the model: a mapping as keywords, a tuple or list as positional arguments, a tensor as the only one."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, tuple | list):
        return model(*batch)
    return model(batch)


def output_tokens(model: nn.Module, batch: Any) -> torch.Tensor | None:
    """What a model is judged by (`first_tensor`) on a batch, without what it returns for padding."""
    output = first_tensor(run(model, batch))
    return None if output is None else counted(output, token_masks(model, batch))


def first_tensor(output: Any) -> torch.Tensor | None:
    """The float tensor that a model is judged by, in what it returned: a tensor, or a mapping, tuple or list. "logits"
    go before all others, and a single number, the loss that models return for labels, comes after all others."""
    if isinstance(output, torch.Tensor):
        return output if output.is_floating_point() else None
    values: Iterable[Any] = ()
    if isinstance(output, Mapping):
        values = [output[key] for key in sorted(output, key=lambda key: key != "logits")]
    elif isinstance(output, tuple | list):
        values = output
    number: torch.Tensor | None = None
    for value in values:
        found = first_tensor(value)
        if found is not None and found.dim() > 0:
            return found
        number = found if number is None else number
    return number


class OutputError:
    """Sums the squares of a layer's output and of the replacement's deviation from it, over the tokens that count."""

    def __init__(self, replacement: nn.Module) -> None:
        self.replacement = replacement
        self.signal = self.noise = 0.0
        self.calls = 0

    def hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
        signal, noise = squared_errors(counted(output), counted(self.replacement(*args, **kwargs)))
        self.signal += signal
        self.noise += noise
        self.calls += 1

    @property
    def sqnr_db(self) -> float | None:
        """None if the layer was never called."""
        return sqnr_db(self.signal, self.noise) if self.calls else None


#: Cosine of a model's output in floating point under our attention function to that under its own.
_SAME_FUNCTION = 0.9999


@dataclass(frozen=True)
class Reference:
    """What a model's output was on a batch, to be compared with later: evenly spaced rows of a large one.

    Attributes:
        batch: the input.
        shape: of the first float tensor that the model returned.
        rows: of that tensor [..., C], without padding, or all of it.
        masks: which tokens count.
        finite: whether these held neither NaN nor infinity.
    """

    batch: Any
    shape: torch.Size
    rows: torch.Tensor
    finite: bool
    masks: Masks = ()

    @classmethod
    def of(cls, batch: Any, output: torch.Tensor, masks: Masks = ()) -> Reference:
        """Takes what is kept of an output."""
        rows = _spaced(output, masks)
        # A view would hold all of it.
        rows = rows.clone() if rows is not output else output
        return cls(batch, output.shape, rows, finite(counted(output, masks)), masks)

    def cosine_to(self, output: torch.Tensor) -> float:
        """Of an output of the same shape."""
        return cosine(_spaced(output, self.masks), self.rows)

    def is_finite(self, output: torch.Tensor) -> bool:
        """Whether an output of the same shape holds neither NaN nor infinity, but for padding."""
        return finite(counted(output, self.masks))


def _spaced(output: torch.Tensor, masks: Masks) -> torch.Tensor:
    mask = token_mask(output, masks)
    if output.numel() <= PIECE or output.dim() < 2:
        return output if mask is None else output[mask]
    step = math.ceil(output.numel() / PIECE)
    if mask is None:
        return output.reshape(-1, output.shape[-1])[::step]
    return output.flatten(0, mask.dim() - 1)[mask.flatten().nonzero()[::step, 0]]


@dataclass
class Comparison:
    """What one pass over the data found.

    Attributes:
        layers: errors by replaced module.
        attention: errors in the order of the matches.
        reference: the first batch, and the model's output on it; None where that holds no float tensor.
        same_function: whether the output stayed what it was when `transformers` attention was computed by our function,
            still in floating point. It is not where a model does more than its attention function is told.
    """

    layers: dict[nn.Module, OutputError]
    attention: list[AttentionError]
    reference: Reference | None
    same_function: bool = True


def compare_outputs(
    model: nn.Module, replacements: dict[nn.Module, nn.Module], data: Any, attentions: Sequence[AttentionMatch] = ()
) -> Comparison:
    """Runs `model` on `data` and feeds each replaced layer's inputs to its replacement too.

    Attention computes in floating point meanwhile, through the modules of the matches: the queries, keys and values
    that are compared are those of the original model.
    """
    layers = {old: OutputError(new) for old, new in replacements.items()}
    errors = [AttentionError(m.step.attention_bits or 8) for m in attentions]
    hugging_face = {m.names[0]: m.attention for m in attentions if m.kind == "transformers"}
    stream = batches(data)
    first = next(stream)
    with evaluating(model), ExitStack() as stack:
        expected = reference(model, first) if hugging_face else None
        if hugging_face:
            stack.enter_context(attached(model, hugging_face))
        for m, error in zip(attentions, errors, strict=True):
            stack.callback(m.attention.register_forward_hook(error.hook, with_kwargs=True).remove)
            if m.converted is not None:
                stack.enter_context(evaluating(m.converted))
                stack.callback(m.module.register_forward_hook(_also(m.converted), with_kwargs=True).remove)
        for old, layer_error in layers.items():
            stack.callback(old.register_forward_hook(layer_error.hook, with_kwargs=True).remove)
        output = reference(model, first)
        for batch in stream:
            trim()
            run(model, batch)
    found = Comparison(layers, errors, output if expected is None else expected)
    if expected is not None and output is not None:
        found.same_function = output.shape == expected.shape and (
            cosine(output.rows.nan_to_num(), expected.rows.nan_to_num()) >= _SAME_FUNCTION
        )
    return found


def reference(model: nn.Module, batch: Any) -> Reference | None:
    """Runs a model, in evaluation mode, on a batch; None if it returns no float tensor."""
    trim()
    with trimmed_between_blocks(model):
        output = first_tensor(run(model, batch))
    found = None if output is None else Reference.of(batch, output, token_masks(model, batch))
    del output
    trim()
    return found


def _also(other: nn.Module) -> Callable[..., None]:
    """A forward hook that calls another module with the same arguments."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        other(*args, **kwargs)

    return hook


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, and without torch's Transformer fast path, which calls no child modules."""
    training = [m for m in model.modules() if m.training]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module in training:
            module.training = True
