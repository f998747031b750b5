"""What a terminal shows while layers are solved: how far it is, and how each layer came out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tcompress.layer_job import Job


class LayerProgress:
    """Counts layers as they are done, with a line for each block: the signal-to-noise ratios of its layers' outputs on
    the data, or the loss that AutoRound began and ended with.

    Args:
        bar: where it is shown; None for nowhere, where nothing is measured for it.
        total: layers.
    """

    def __init__(self, bar: Progress | None, total: int) -> None:
        self._bar, self._found = bar, list[str]()
        self._task = None if bar is None else bar.add_task("calibrating", total=total)

    @property
    def shown(self) -> bool:
        return self._bar is not None

    def solved(self, name: str, sqnr_db: float | None) -> None:
        """A layer is done; without a ratio if its data do not tell."""
        last = name.rpartition(".")[2]
        self._found.append(last if sqnr_db is None else f"{last} {sqnr_db:.1f} dB")

    def learned(self, first: float, least: float) -> None:
        """AutoRound is done with a block."""
        self._found.append(f"mean squared error of the block {first:.3g} -> {least:.3g}")

    def done(self, jobs: list[Job], where: str, kept: bool = False) -> None:
        """All layers of a block, or outside of blocks, are done.

        Args:
            where: its name.
            kept: they were by an earlier run.
        """
        found, self._found = self._found, []
        if self._bar is None or self._task is None:
            return
        self._bar.advance(self._task, len(jobs))
        if kept:
            found = ["taken from the run before"]
        if found:
            self._bar.console.print(f"{where}: {', '.join(found)}", highlight=False, markup=False)


@contextmanager
def layer_progress(total: int, shown: bool) -> Iterator[LayerProgress]:
    """For a while, a bar on the terminal."""
    if not shown:
        yield LayerProgress(None, total)
        return
    text = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*text, transient=True, console=get_console()) as bar:
        yield LayerProgress(bar, total)
