"""What compression did to a model, what it brought and what it cost."""

from __future__ import annotations

import io
import math
from typing import Any

from pydantic import BaseModel, ConfigDict, field_serializer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tcompress.recipe import Recipe
from tcompress.report.attention import AttentionReport, attention_table
from tcompress.report.size import Sizes

MIB = 2**20


class LayerReport(BaseModel):
    """One module that the recipe targets.

    Attributes:
        name: path in the model; `aliases` are further paths of the same module.
        kind: class before compression.
        action: the scheme's name, or "skipped", with `reason`.
        shape: of the weight, as [N, K].
        bytes_before, bytes_after: of its state dict.
        sparsity: part of the stored weight that is zero; None where nothing was changed.
        weight_sqnr_db: signal-to-quantization-noise ratio of the weight, 10·log10(ΣW² / Σ(Ŵ-W)²).
        output_sqnr_db: the same for its output on the data; None without data or if it was never called.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    aliases: tuple[str, ...] = ()
    kind: str
    action: str
    reason: str = ""
    shape: tuple[int, ...]
    bytes_before: int
    bytes_after: int
    sparsity: float | None = None
    weight_sqnr_db: float | None = None
    output_sqnr_db: float | None = None

    @field_serializer("weight_sqnr_db", "output_sqnr_db", when_used="json")
    def _json_number(self, value: float | None) -> float | str | None:
        # JSON has no infinity; a weight that fits the grid exactly has an infinite ratio.
        return value if value is None or math.isfinite(value) else str(value)


class Report(BaseModel):
    """The report of `compress`; `str()` and `print()` give tables, `to_json()` all of it.

    Attributes:
        recipe: as it was applied.
        layers: every targeted module, replaced ones first.
        attention: every targeted attention module.
        before, after: bytes of the model.
        output_cosine: of the model's output on the first batch of the data, before and after; None without data.
        warnings: where compression did less than asked or made something worse.
    """

    model_config = ConfigDict(frozen=True)
    recipe: Recipe
    layers: tuple[LayerReport, ...]
    attention: tuple[AttentionReport, ...] = ()
    before: Sizes
    after: Sizes
    output_cosine: float | None = None
    warnings: tuple[str, ...] = ()

    @property
    def compressed(self) -> tuple[LayerReport, ...]:
        """The modules that steps changed."""
        return tuple(layer for layer in self.layers if layer.action != "skipped")

    @property
    def prepared(self) -> tuple[LayerReport, ...]:
        """Of those, the ones that were only made ready for other steps, or trained: as large as before, and float."""
        return tuple(
            layer
            for layer in self.compressed
            if layer.sparsity is None and layer.weight_sqnr_db is None and layer.bytes_after == layer.bytes_before
        )

    @property
    def skipped(self) -> tuple[LayerReport, ...]:
        """The targeted modules that were left as they are."""
        return tuple(layer for layer in self.layers if layer.action == "skipped")

    @property
    def counts(self) -> str:
        """How many layers are in each of these, in words; one that several steps changed is one."""
        prepared = {layer.name for layer in self.prepared}
        made = {layer.name for layer in self.compressed if layer not in self.prepared}
        counts = [f"{len(made)} layers compressed", f"{len({layer.name for layer in self.skipped} - made)} skipped"]
        counts[1:1] = [f"{len(prepared)} prepared or trained"] if prepared else []
        return ", ".join(counts)

    def to_json(self, indent: int | None = 2) -> str:
        """JSON text; an infinite ratio is the string "inf"."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Reads what `to_json` wrote."""
        return cls.model_validate_json(text)

    def print(self, console: Console | None = None) -> None:
        """Prints the tables."""
        console = console or Console()
        console.print(self._layer_table())
        if self.attention:
            console.print(attention_table(self.attention))
        console.print(self._size_table())
        if self.output_cosine is not None:
            console.print(f"cosine of the model's output to the original's: {self.output_cosine:.5f}")
        for warning in self.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False)

    def __str__(self) -> str:
        text = io.StringIO()
        self.print(Console(file=text, width=120))
        return text.getvalue().rstrip("\n")

    def _layer_table(self) -> Table:
        table = Table(title=self.counts)
        for heading in ("layer", "type", "shape", "action"):
            table.add_column(heading, overflow="fold")
        for heading in ("zeros", "MiB", "weight SQNR dB", "output SQNR dB"):
            table.add_column(heading, justify="right")
        for layer in self.layers:
            more = f" (+{len(layer.aliases)})" if layer.aliases else ""
            action = layer.action + (f": {layer.reason}" if layer.reason else "")
            change = f"{layer.bytes_before / MIB:.2f}"
            if layer.bytes_after != layer.bytes_before:
                change += f" → {layer.bytes_after / MIB:.2f}"
            shape = "×".join(map(str, layer.shape))
            ratios = (_db(layer.weight_sqnr_db), _db(layer.output_sqnr_db))
            zeros = "-" if layer.sparsity is None else f"{layer.sparsity:.0%}"
            cells = ((layer.name or "(root)") + more, layer.kind, shape, action, zeros, change, *ratios)
            table.add_row(*map(Text, cells))  # as Text: a reason such as "ignored by 'layer.[ab]'" is no markup
        return table

    def _size_table(self) -> Table:
        table = Table(title="size of the model")
        for heading in ("", "before", "after", "ratio"):
            table.add_column(heading, justify="right" if heading else "left")
        rows: list[tuple[str, Any, Any]] = [
            ("on disk", self.before.disk, self.after.disk),
            ("in memory", self.before.resident, self.after.resident),
        ]
        for label, before, after in rows:
            ratio = f"{after / before:.3f}" if before else "-"
            table.add_row(label, f"{before / MIB:.2f} MiB", f"{after / MIB:.2f} MiB", ratio)
        return table


def _db(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
