"""How accurate each attention is once it is quantized."""

from __future__ import annotations

import math

from pydantic import BaseModel, ConfigDict, field_serializer
from rich.table import Table
from rich.text import Text


class AttentionNumbers(BaseModel):
    """The output of quantized attention, O + Δ, against that in floating point, O, on the data.

    Attributes:
        cosine: Σ O(O + Δ) / √(ΣO² Σ(O + Δ)²).
        relative_l1: Σ|Δ| / Σ|O|.
        rmse: √(mean Δ²).
    """

    model_config = ConfigDict(frozen=True)
    cosine: float
    relative_l1: float
    rmse: float

    @classmethod
    def of(cls, numbers: tuple[float, float, float]) -> AttentionNumbers:
        return cls(cosine=numbers[0], relative_l1=numbers[1], rmse=numbers[2])

    @field_serializer("cosine", "relative_l1", "rmse", when_used="json")
    def _json_number(self, value: float) -> float | str:
        return value if math.isfinite(value) else str(value)


class AttentionReport(BaseModel):
    """One attention module that the recipe targets.

    Attributes:
        name: path in the model; `aliases` are further paths of the same module.
        kind: class before compression.
        action: "int8" or "int12" where it was quantized, "float" where the data forbade it, "skipped" where it cannot
            be or is ignored; the latter two with `reason`.
        total: over all heads; None without data or if it was never called.
        heads: each head by itself.
    """

    model_config = ConfigDict(frozen=True)
    name: str
    aliases: tuple[str, ...] = ()
    kind: str
    action: str
    reason: str = ""
    total: AttentionNumbers | None = None
    heads: tuple[AttentionNumbers, ...] = ()

    @property
    def quantized(self) -> bool:
        """Whether it computes in integers."""
        return self.action not in ("float", "skipped")

    @property
    def worst_head(self) -> int | None:
        """The head with the lowest cosine, NaN being lower than any; None without data."""
        cosines = [-math.inf if math.isnan(h.cosine) else h.cosine for h in self.heads]
        return min(range(len(cosines)), key=cosines.__getitem__) if cosines else None


def attention_table(reports: tuple[AttentionReport, ...]) -> Table:
    """A row for each attention module, with the worst head."""
    quantized = sum(r.quantized for r in reports)
    table = Table(title=f"attention: {quantized} quantized, {len(reports) - quantized} in floating point")
    for heading in ("attention", "type", "action"):
        table.add_column(heading, overflow="fold")
    for heading in ("cosine", "relative L1", "RMSE", "worst head"):
        table.add_column(heading, justify="right")
    for r in reports:
        more = f" (+{len(r.aliases)})" if r.aliases else ""
        action = r.action + (f": {r.reason}" if r.reason else "")
        numbers = ("-", "-", "-") if r.total is None else _cells(r.total)
        worst = "-" if r.worst_head is None else f"{r.worst_head}: {r.heads[r.worst_head].cosine:.5f}"
        table.add_row(*map(Text, ((r.name or "(root)") + more, r.kind, action, *numbers, worst)))
    return table


def _cells(numbers: AttentionNumbers) -> tuple[str, str, str]:
    return f"{numbers.cosine:.5f}", f"{numbers.relative_l1:.4f}", f"{numbers.rmse:.2e}"
