"""What a run of `compress` will take, before it: memory from sizes and one sample, time from a few measurements."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from tcompress.calibrate import evaluating
from tcompress.errors import message
from tcompress.expected_memory import MemoryEstimate
from tcompress.expected_run import ExpectedRun, TimeEstimate
from tcompress.expected_training import learning_steps
from tcompress.input_scales import has_static, no_samples
from tcompress.layer_job import jobs_of
from tcompress.match import match
from tcompress.match_attention import holding, match_attention
from tcompress.memory import in_units, parse_bytes
from tcompress.memory_plan import NOT_WITHIN, all_keep_within
from tcompress.prune_step import prune_masks
from tcompress.recipe import Distill, Recipe, Transform
from tcompress.samples import Samples
from tcompress.solve import steps_with_data


@dataclass(frozen=True)
class Estimate:
    """The result of `estimate`; `str()` and `print()` give a table.

    Attributes:
        samples: how many are looked at (`Recipe.samples`; training takes all that are given).
        layers: how many are compressed.
        notes: what is not in it.
    """

    memory: MemoryEstimate
    time: TimeEstimate
    samples: int
    layers: int
    notes: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """All of it in one line."""
        factor = f"{self.memory.peak / self.memory.model:.2f}x the model there" if self.memory.model else ""
        peak = f"{in_units(self.memory.peak)} ({factor}, {self.memory.when})"
        return f"{self.layers} layers, {self.samples} samples: about {_seconds(self.time.total)}, at most {peak}"

    def print(self, console: Console | None = None) -> None:
        """Prints it."""
        memory, seconds = Table(title="memory"), Table(title="time")
        for table, rows in ((memory, self._memory_rows()), (seconds, self._time_rows())):
            table.add_column("")
            table.add_column("about", justify="right")
            for row in rows:
                table.add_row(*row)
        console = console or Console()
        console.print(self.line, memory, seconds, *self.notes, sep="\n", soft_wrap=True)

    def _memory_rows(self) -> list[tuple[str, str]]:
        names = ("model", "activations", "hessians", "compressed", "work", "training", "peak")
        return [(name, in_units(getattr(self.memory, name))) for name in names]

    def _time_rows(self) -> list[tuple[str, str]]:
        names = ("forward", "statistics", "solving", "comparing", "training", "total")
        return [(name, _seconds(getattr(self.time, name))) for name in names]

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(file=text, width=100))
        return text.getvalue().rstrip("\n")


def estimate(
    model: nn.Module,
    recipe: str | Path | dict[str, Any] | Recipe = "int8",
    data: Any = None,
    *,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    inplace: bool = False,
    max_memory: int | str | None = None,
    seconds: float = 5.0,
) -> Estimate:
    """What `compress` with the same arguments will take: memory at the peak, and time.

    Sizes are counted, from the tensors that live while the model runs on the first sample. Time comes from that, from
    a matrix product, and from solving layers of each size, the small ones first, until `seconds` are over; larger ones
    are taken in proportion to N·K² + K³, or to N·K without Hessians. A step of training (distill, finetune) is taken
    for four forward passes a batch. The machine's other work is in it. Other steps that make another model in floating
    point (smooth, awq, rotate, shrink, …) are not, and `notes` says so.

    Args:
        model: is not changed.
        recipe, data, tokenizer, max_length, inplace, max_memory: as for `compress`.

    Raises:
        TypeError, ValueError: as `compress`, as far as it is seen before the run.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("estimate", "model", type(model).__name__, "a torch.nn.Module"))
    recipe = Recipe.load(recipe)
    limit = None if max_memory is None else parse_bytes(max_memory, "max_memory")
    samples = [] if data is None else Samples(data, model, tokenizer, max_length).read("estimate")
    needing = steps_with_data(recipe)
    for step in [*needing, *learning_steps(recipe)]:
        if not samples:
            raise ValueError(message("estimate", "data", "none", "calibration samples", f"{step.step} needs them"))
    transforms = [step.step for step in recipe.steps if isinstance(step, Transform)]
    unknown = [step.step for step in recipe.steps if isinstance(step, Transform) and not isinstance(step, Distill)]
    notes = [f"not in it: {', '.join(unknown)}"] if unknown else []
    attentions, attention_skips = match_attention(model, recipe)
    converted = {m.module: m.converted for m in attentions if m.converted is not None}
    pruned, skips = prune_masks(model, recipe, converted)
    masks = {module: p.zeros if p.mask is None else p.mask for module, p in pruned.items()}
    required = not attentions and not pruned and not transforms
    matches, _ = match(model, recipe, converted, required, [*skips, *attention_skips], masks)
    del masks
    if has_static(matches) and not samples:
        raise no_samples("estimate", matches)
    if limit is not None and not all_keep_within(recipe):
        notes.append(f"max_memory: {NOT_WITHIN}")
    jobs = jobs_of(matches, pruned)
    with evaluating(model), ExitStack() as stack:
        # As where they are solved: what is given to the projections of torch's attention is seen there alone.
        stack.enter_context(holding(model, converted))
        for module in converted.values():
            stack.enter_context(evaluating(module))
        limit = limit if needing else None
        run = ExpectedRun(model, samples, jobs, matches, limit, bool(needing), inplace, recipe, bool(attentions))
        memory, spent = run.memory(), run.time(seconds)
    return Estimate(memory, spent, len(samples[: recipe.samples]), len(jobs), tuple(notes))


def _seconds(value: float) -> str:
    if value < 100:
        return f"{value:.1f} s"
    minutes = value / 60
    return f"{minutes:.0f} min" if minutes < 100 else f"{minutes / 60:.1f} h"
