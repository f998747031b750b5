"""The attention part of compression: what is quantized, by its accuracy on the data, and how it is put in place."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from tcompress.calibrate import Comparison
from tcompress.integrations.attention_modules import attach
from tcompress.match import Skip
from tcompress.match_attention import AttentionMatch
from tcompress.nn import MultiHeadAttention
from tcompress.report.attention import AttentionNumbers, AttentionReport

NOT_CHECKED = "accuracy not checked: no data"


def decide(matches: Sequence[AttentionMatch], found: Comparison | None, notes: list[str]) -> list[AttentionReport]:
    """What becomes of each match: quantized, or in floating point where the data says so. Adds to the warnings."""
    reports = []
    for i, m in enumerate(matches):
        report = AttentionReport(
            name=m.names[0],
            aliases=m.names[1:],
            kind=type(m.module).__name__,
            action=str(m.step.attention),
            reason=NOT_CHECKED if found is None else "",
        )
        if found is not None:
            report = report.model_copy(update=_outcome(m, found, i))
        if report.reason and found is not None:
            notes.append(f"attention {m.names[0] or '(root)'}: {report.reason}")
        reports.append(report)
    return reports


def _outcome(m: AttentionMatch, found: Comparison, i: int) -> dict[str, object]:
    """The fields of a report that the data decides."""
    if m.kind == "transformers" and not found.same_function:
        return {"action": "skipped", "reason": "the model's output depends on more than its attention function is told"}
    error = found.attention[i]
    if not error.calls:
        return {"reason": "never called on the data: accuracy not checked"}
    total = AttentionNumbers.of(error.total)
    numbers = {"total": total, "heads": tuple(map(AttentionNumbers.of, error.heads))}
    least = m.step.min_cosine
    assert least is not None
    if total.cosine >= least:
        return numbers
    reason = f"cosine {total.cosine:.7f} with {m.step.attention} is below {least}"
    return {**numbers, "action": "float", "reason": reason}


def install(model: nn.Module, matches: Sequence[AttentionMatch], reports: Sequence[AttentionReport]) -> None:
    """Puts the decisions into effect in the compressed model."""
    hugging_face = {}
    for m, report in zip(matches, reports, strict=True):
        attention = m.attention
        if m.kind == "tcompress":  # the model may be a copy
            module = model.get_submodule(m.names[0])
            assert isinstance(module, MultiHeadAttention)
            attention = module.attention
        assert m.step.attention_bits is not None
        attention.bits = m.step.attention_bits
        attention.precision = "int8" if report.quantized else "float"
        if m.kind == "transformers":
            hugging_face[m.names[0]] = attention
    if any(attention.precision == "int8" for attention in hugging_face.values()):
        attach(model, hugging_face)


def skipped(skips: Sequence[Skip]) -> list[AttentionReport]:
    """Reports of the attention that the steps target and leave as it is."""
    return [
        AttentionReport(
            name=s.names[0], aliases=s.names[1:], kind=type(s.module).__name__, action="skipped", reason=s.reason
        )
        for s in skips
    ]
