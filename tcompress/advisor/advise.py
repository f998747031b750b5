"""Measures candidate recipes on a model and on this machine."""

from __future__ import annotations

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich import get_console
from rich.progress import track
from torch import nn

from tcompress import calibrate, distances
from tcompress.advisor.advice import Advice, Measured, misses, misses_in_quality, ranked
from tcompress.advisor.candidates import Candidate, candidates, checked, with_sensitive_layers_in_8_bits
from tcompress.advisor.follow_ups import follow_ups
from tcompress.advisor.profile import Profile, kernel_seconds, name_of, profile
from tcompress.advisor.target import Target
from tcompress.compress import CompressResult, compress
from tcompress.errors import CompressionWarning, message
from tcompress.layer_report import NO_SPEEDUP
from tcompress.match import output_embeddings
from tcompress.quantize.scheme import SCHEMES, Scheme, int8_scheme
from tcompress.report.size import model_sizes
from tcompress.samples import Samples
from tcompress.timing import alternate

Metric = Callable[[nn.Module], float]

#: In which kernels take inputs.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Bench:
    """What candidates are measured with."""

    model: nn.Module
    fit: list[Any] | None
    metric: Metric | None
    target: Target
    maximize: bool
    seconds: float
    baseline: Measured


def advise(
    model: nn.Module,
    data: Any = None,
    metric: Metric | None = None,
    target: Target | dict[str, Any] | None = None,
    *,
    maximize: bool = True,
    candidates: Sequence[Any] | None = None,
    tokenizer: Callable[..., Any] | None = None,
    max_length: int | None = None,
    seconds: float = 1.0,
    progress: bool = True,
) -> Advice:
    """Which recipe suits a model, the accuracy needed and this machine; every number in the answer is measured here.

    The candidates follow from the model's numbers (zeros, tokens a call) and from what was measured before: where four
    bits hurt some layers much more than others, those are tried in eight. Each is compressed, timed in turn with the
    model as it is, measured, and dropped again, so that at most two models are in memory.

    Args:
        model: as for `compress`; unchanged.
        data: as for `compress`. Without it there are no times, no algorithms that need samples, and no quality but by
            `metric`.
        metric: called with a model, gives a number. Without it the quality is the mean cosine of the outputs to those
            of the model as it is, on samples that calibration does not see where there are two or more.
        target: a `Target`, or a dict of its limits, such as {"disk": "25 MB", "max_loss": 0.01}.
        maximize: more of the metric is better; False for perplexities and error rates.
        candidates: recipes to try instead; whatever `compress` takes.
        tokenizer, max_length: as for `compress`.
        seconds: for which each candidate is timed.
        progress: show a progress bar on a terminal.

    Returns:
        The candidates in order, with their recipes; one that cannot be made stands last, with the reason.

    Raises:
        TypeError: no module, or a target, metric or data of an unusable kind. ValueError: an unknown limit, no usable
            data, or a metric of the model as it is that is not finite. RuntimeError: the metric raised an error; on
            which model is said.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(message("advise", "model", type(model).__name__, "a torch.nn.Module"))
    if metric is not None and not callable(metric):
        raise TypeError(message("advise", "metric", type(metric).__name__, "a callable that takes a model"))
    wanted = Target.load(target)
    cleaned = None if data is None else Samples(data, model, tokenizer, max_length)
    samples = None if cleaned is None else list(cleaned)
    fit, held_out = _split(samples)
    about = profile(model, None if fit is None else fit[0])
    if metric is None and held_out is not None:
        metric, maximize, kind = _cosine_to(model, held_out), True, "cosine"
    else:
        kind = "metric"
    bench = _Bench(model, fit, metric, wanted, maximize, seconds, _as_it_is(model, metric))
    tried, untried = _try_all(bench, about, checked(candidates) if candidates is not None else None, progress)
    baseline = bench.baseline
    times = [row.seconds * row.speedup for row in tried if row.seconds is not None and row.speedup is not None]
    if times:
        baseline = baseline.model_copy(update={"seconds": statistics.median(times), "speedup": 1.0})
    rows = _with_reasons(ranked(tried), baseline)
    notes = [*([] if cleaned is None else cleaned.notes), *_notes(about, baseline), *untried]
    return Advice(target=wanted, baseline=baseline, rows=rows, notes=tuple(notes), metric=kind)


def _try_all(
    bench: _Bench, about: Profile, given: list[Candidate] | None, progress: bool
) -> tuple[list[Measured], list[str]]:
    """What was measured, and what was not, with the reason."""
    show = progress and get_console().is_terminal
    rows: list[Measured] = []
    more: list[Candidate] = []

    def go_through(queue: Sequence[Candidate], what: str) -> None:
        for candidate in track(queue, what, disable=not show, transient=True):
            row, result = _try(bench, candidate)
            rows.append(row)
            if given is None and result is not None and bench.fit is not None and "int4" in candidate.name:
                mixed = with_sensitive_layers_in_8_bits(candidate, result.report)
                more.extend([] if mixed is None else [mixed])

    go_through(candidates(about, bench.fit is not None) if given is None else given, "trying recipes")
    if given is not None or bench.fit is None:
        return rows, []
    times = [row.seconds * row.speedup for row in rows if row.seconds is not None and row.speedup is not None]
    seconds = statistics.median(times) if times else None
    logits = output_embeddings(bench.model) is not None
    found, untried = follow_ups(rows, bench.target, bench.maximize, seconds, logits)
    go_through([*more, *found], "trying more")
    return rows, untried


def _split(samples: list[Any] | None) -> tuple[list[Any] | None, list[Any] | None]:
    """Samples to decide by and samples to judge by; the same where there is one."""
    if samples is None or len(samples) < 2:
        return samples, samples
    half = (len(samples) + 1) // 2
    return samples[:half], samples[half:]


def _as_it_is(model: nn.Module, metric: Metric | None) -> Measured:
    sizes = model_sizes(model)
    quality = None if metric is None else _value(metric, model, "as it is")
    if quality is not None and not math.isfinite(quality):
        raise ValueError(message("advise", "metric", f"{quality} for the model as it is", "a finite number"))
    loss = None if quality is None else 0.0
    return Measured(name="as it is", disk=sizes.disk, memory=sizes.resident, quality=quality, loss=loss)


def _value(metric: Metric, model: nn.Module, name: str) -> float:
    try:
        value = metric(model)
    except Exception as error:
        got = f"an error on {name!r} ({type(error).__name__}: {error})"
        raise RuntimeError(message("advise", "metric", got, "a number")) from error
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        got = f"{type(value).__name__} on {name!r}"
        raise TypeError(message("advise", "metric", got, "a number")) from error


def _cosine_to(model: nn.Module, samples: list[Any]) -> Metric:
    with calibrate.evaluating(model):
        expected = [calibrate.output_tokens(model, sample) for sample in samples]

    def metric(other: nn.Module) -> float:
        found = []
        with calibrate.evaluating(other):
            for sample, before in zip(samples, expected, strict=True):
                got = calibrate.output_tokens(other, sample)
                if before is None or got is None or got.shape != before.shape:
                    return math.nan
                found.append(distances.cosine(got, before))
        return sum(found) / len(found)

    return metric


def _try(bench: _Bench, candidate: Candidate) -> tuple[Measured, CompressResult | None]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompressionWarning)  # they are in the report
            result = compress(bench.model, candidate.recipe, bench.fit, progress=False)
        seconds, speedup = _times(bench, result.model)
    except (ValueError, TypeError, RuntimeError) as error:  # recipe and model do not go together: said in the table
        text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        failed = Measured(name=candidate.name, recipe=candidate.recipe, failure=text, reason=f"failed: {text}")
        return failed, None
    sizes = model_sizes(result.model)
    quality = None if bench.metric is None else _value(bench.metric, result.model, candidate.name)
    row = Measured(
        name=candidate.name,
        recipe=candidate.recipe,
        disk=sizes.disk,
        memory=sizes.resident,
        seconds=seconds,
        speedup=speedup,
        quality=quality,
        loss=_loss(quality, bench.baseline.quality, bench.maximize),
        reason=" ".join((f"{candidate.why}.", *_dense(result), _worst(result))).rstrip(),
    )
    missed = (*misses(row, bench.target), *misses_in_quality(row, bench.target, bench.maximize))
    return row.model_copy(update={"misses": missed}), result


def _times(bench: _Bench, model: nn.Module) -> tuple[float | None, float | None]:
    """Seconds of a call, and how many times as fast that is as the model as it is; None without data."""
    if bench.fit is None:
        return None, None
    with calibrate.evaluating(bench.model), calibrate.evaluating(model), torch.inference_mode():
        functions = [_call(m, bench.fit[0]) for m in (bench.model, model)]
        before, after = alternate(functions, bench.seconds, warm_up=2)
    return after.median, before.median / after.median


def _loss(quality: float | None, before: float | None, maximize: bool) -> float | None:
    if quality is None or before is None:
        return None
    worse = before - quality if maximize else quality - before
    return worse / abs(before) if before else worse


def _call(model: nn.Module, batch: Any) -> Callable[[], Any]:
    return lambda: calibrate.call(model, batch)


def _worst(result: CompressResult) -> str:
    errors = {r.name: r.output_sqnr_db for r in result.report.compressed if r.output_sqnr_db is not None}
    if not errors:
        return ""
    name = min(errors, key=lambda n: errors[n])
    return f"Most is lost in {name} ({errors[name]:.1f} dB)."


def _dense(result: CompressResult) -> list[str]:
    """What the report says of zeros that bring no speed."""
    return [f"{note.capitalize()}." for note in result.report.warnings if NO_SPEEDUP in note]


def _with_reasons(rows: Sequence[Measured], baseline: Measured) -> tuple[Measured, ...]:
    by_name: Mapping[str, Measured] = {row.name: row for row in rows}
    return tuple(
        row if row.failure else row.model_copy(update={"reason": _reason(row, baseline, by_name)}) for row in rows
    )


def _reason(row: Measured, baseline: Measured, others: Mapping[str, Measured]) -> str:
    assert row.disk is not None
    assert baseline.disk is not None
    parts = [f"{row.disk / max(baseline.disk, 1):.2f} of the disk space"]
    if row.speedup is not None:
        speed = f"{row.speedup:.2f}x as fast" if row.speedup >= 1 else f"slower ({row.speedup:.2f}x)"
        parts.append(speed)
    if row.loss is not None:
        parts.append("nothing lost" if row.loss <= 0 else f"{row.loss:.2%} of the quality lost")
    text = ", ".join(parts)
    if row.misses:
        text += f"; misses the target: {'; '.join(row.misses)}"
    elif row.dominated_by is not None:
        text += f"; {row.dominated_by!r} is no worse in anything and better in something"
    elif others:
        text += "; on the front"
    return f"{text}. Tried because: {row.reason}"


def _notes(about: Profile, baseline: Measured) -> list[str]:
    found = [
        f"{about.parameters / 1e6:.1f} M parameters: {about.linear:.0%} in linear layers, {about.embedding:.0%} in "
        f"embeddings; {about.zeros:.0%} of the linear layers' weights is zero"
    ]
    # On other devices calls return before they are done, so that one layer's time is not that of its call.
    if baseline.quality is None:
        found.append("what recipes cost in quality was not measured: give data, or a metric")
    if about.calls and baseline.seconds and about.cpu_dtype in _FLOATS:
        schemes: list[Scheme] = [int8_scheme(), SCHEMES["W4A8-g32"], SCHEMES["W4A16-g64"]]
        times = kernel_seconds(about.calls, schemes, dtype=about.cpu_dtype)
        dtype = name_of(about.cpu_dtype)
        plain = times.pop(dtype)
        gains = ", ".join(f"{name} {plain / max(value, 1e-9):.1f}x" for name, value in times.items())
        share = plain / baseline.seconds
        found.append(f"linear layers take about {share:.0%} of a call in torch's {dtype}; alone, by kernel: {gains}")
    return found
