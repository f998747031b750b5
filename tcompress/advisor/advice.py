"""What candidates turned out to bring and to cost, in order."""

from __future__ import annotations

import io
import math

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tcompress.advisor.target import Target
from tcompress.recipe import Recipe

#: Times and metrics that are closer than this are taken as equal: the machine is not quieter.
NOISE = 0.03


class Measured(BaseModel):
    """One candidate, compressed and measured on this machine.

    Attributes:
        name, recipe: of the candidate; None for the model as it is.
        disk, memory: bytes (`report.Sizes`).
        seconds: a call on the first batch, the median of calls in turn with the model as it is; None without data.
        speedup: over the model as it is.
        quality: the metric, or the cosine of the outputs; None without data and metric.
        loss: by how much the quality is worse, relative to the model as it is; negative where it is better.
        misses: the limits that it does not keep to, in words.
        dominated_by: a candidate that is no worse in anything and better in something, or None: it is on the front.
        reason: in plain words, what speaks for and against it.
        failure: why it could not be made; all numbers are then None.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    recipe: Recipe | None = None
    disk: int | None = None
    memory: int | None = None
    seconds: float | None = None
    speedup: float | None = None
    quality: float | None = None
    loss: float | None = None
    misses: tuple[str, ...] = ()
    dominated_by: str | None = None
    reason: str = ""
    failure: str | None = None

    @property
    def meets_target(self) -> bool:
        """Whether it was made and keeps to all limits."""
        return self.failure is None and not self.misses


class Advice(BaseModel):
    """The answer of `advise`; `str()` and `print()` give a table with reasons.

    Attributes:
        target: what was asked.
        baseline: the model as it is.
        rows: the candidates, the best first: those that keep to the target, before them those on the Pareto front, the
            smallest and fastest of these first; then those that miss it, by how much.
        notes: what was found about the model and the machine.
        metric: what the quality is.
    """

    model_config = ConfigDict(frozen=True)
    target: Target
    baseline: Measured
    rows: tuple[Measured, ...]
    notes: tuple[str, ...] = ()
    metric: str = "metric"

    @property
    def best(self) -> Measured | None:
        """The first that keeps to the target, None if there is none."""
        return next((row for row in self.rows if row.meets_target), None)

    @property
    def recipe(self) -> Recipe | None:
        """Of the best."""
        return None if self.best is None else self.best.recipe

    def to_json(self, indent: int | None = 2) -> str:
        """JSON text of all of it."""
        return self.model_dump_json(indent=indent)

    def print(self, console: Console | None = None) -> None:
        """Prints the table, the reasons and the notes."""
        console = console or Console()
        console.print(self._table())
        for place, row in enumerate(self.rows, 1):
            console.print(f"{place}. {row.name}: {row.reason}", markup=False, highlight=False)
        for note in self.notes:
            console.print(f"- {note}", markup=False, highlight=False)
        verdict = f"take {self.best.name!r}" if self.best else "no candidate keeps to the target"
        console.print(verdict, markup=False, style="bold")

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(file=text, width=120))
        return text.getvalue().rstrip("\n")

    def _table(self) -> Table:
        table = Table(title="candidates, measured on this machine")
        table.add_column("recipe", overflow="fold")
        for heading in ("disk MB", "memory MB", "ms", "speedup", self.metric, "loss", "target", "front"):
            table.add_column(heading, justify="right")
        for row in (self.baseline, *self.rows):
            if row.failure is not None:
                table.add_row(Text(row.name), *["-"] * 6, "failed", "")
                continue
            assert row.disk is not None
            assert row.memory is not None
            cells = [
                f"{row.disk / 1e6:.1f}",
                f"{row.memory / 1e6:.1f}",
                "-" if row.seconds is None else f"{row.seconds * 1e3:.2f}",
                "-" if row.speedup is None else f"{row.speedup:.2f}x",
                "-" if row.quality is None else f"{row.quality:.4f}",
                "-" if row.loss is None else f"{row.loss:+.2%}",
                "" if row.recipe is None else "yes" if row.meets_target else "no",
                "" if row.recipe is None else "yes" if row.dominated_by is None else "no",
            ]
            table.add_row(Text(row.name), *cells)
        return table


def misses(row: Measured, target: Target) -> tuple[str, ...]:
    """The limits that a candidate does not keep to, in words."""
    found = []
    for name, got, limit, unit, factor in (
        ("disk", row.disk, target.disk, "MB on disk", 1e-6),
        ("memory", row.memory, target.memory, "MB in memory", 1e-6),
        ("latency", row.seconds, target.latency, "ms a call", 1e3),
    ):
        if limit is not None and got is None:
            found.append(f"{name} was not measured: give data")
        elif limit is not None and got is not None and got > limit:
            found.append(f"{got * factor:.4g} {unit}, {limit * factor:.4g} allowed")
    if target.speedup is not None and (row.speedup is None or row.speedup < target.speedup):
        speed = "speed was not measured: give data" if row.speedup is None else f"{row.speedup:.2f}x as fast"
        found.append(f"{speed}, {target.speedup:.2f}x asked for")
    return tuple(found)


def misses_in_quality(row: Measured, target: Target, higher_is_better: bool) -> tuple[str, ...]:
    """The same for the limits on the metric. A metric that is NaN keeps to none."""
    found = []
    if target.metric is not None:
        if row.quality is None:
            found.append("the metric was not measured: give data or a metric")
        elif not (row.quality >= target.metric if higher_is_better else row.quality <= target.metric):
            found.append(f"the metric is {row.quality:.4f}, {target.metric:.4f} asked for")
    if target.max_loss is not None:
        if row.loss is None:
            found.append("the loss was not measured: give data or a metric")
        elif not row.loss <= target.max_loss:
            found.append(f"{row.loss:.2%} of the metric lost, {target.max_loss:.2%} allowed")
    return tuple(found)


def _costs(row: Measured) -> tuple[float, ...]:
    """What is better the smaller it is; a NaN is infinitely bad."""
    values = (row.disk, row.memory, row.seconds, row.loss)
    return tuple(0.0 if v is None else math.inf if math.isnan(v) else float(v) for v in values)


def dominates(a: Measured, b: Measured) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better by more than noise."""
    mine, its = _costs(a), _costs(b)
    # Losses are compared as such: near zero a relative margin would be none.
    margins = (0.0, 0.0, NOISE * its[2], NOISE * 0.01)
    no_worse = all(x <= y + margin for x, y, margin in zip(mine, its, margins, strict=True))
    return no_worse and any(x < y - margin for x, y, margin in zip(mine, its, margins, strict=True))


def ranked(rows: list[Measured]) -> tuple[Measured, ...]:
    """In the order of `Advice.rows`, with `dominated_by` filled in."""
    made = [row for row in rows if row.failure is None]
    rows = [
        row
        if row.failure is not None
        else row.model_copy(update={"dominated_by": next((o.name for o in made if dominates(o, row)), None)})
        for row in rows
    ]

    def place(row: Measured) -> tuple[float, ...]:
        if row.failure is not None:
            return (3.0,)
        size, _, seconds, loss = _costs(row)
        score = math.log(max(size, 1)) + math.log(max(seconds, 1e-9))
        if row.meets_target:
            return (0.0 if row.dominated_by is None else 1.0, score)
        return (2.0, len(row.misses), loss)

    return tuple(sorted(rows, key=place))
