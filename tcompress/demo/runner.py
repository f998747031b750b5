"""The demo: a pretrained sentence encoder compressed to int8, measured on this machine against float32."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import tcompress
from tcompress.backend import cpu_path
from tcompress.demo.sentence_encoder import SentenceEncoder, load_minilm
from tcompress.demo.tasks import Metric, boolq_retrieval, wordsim353_spearman
from tcompress.timing import Timing, alternate

#: Batch and sequence length of the timed inputs.
SHAPES = ((1, 32), (1, 128), (16, 128))
#: A metric may fall this far below float32.
MAX_LOSS = 0.005
CALIBRATION = (
    "A man is eating a piece of bread.",
    "Interest rates rose again in the third quarter, the central bank said.",
    "Which river flows through the old town?",
    "The kernel multiplies bytes and adds the products in thirty-two bits.",
)


@dataclass(frozen=True)
class Latency:
    """Seconds for one shape, before and after."""

    batch: int
    tokens: int
    before: Timing
    after: Timing

    @property
    def speedup(self) -> float:
        return self.before.median / self.after.median


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured: latencies, the metrics before and after, bytes of the checkpoints."""

    latencies: tuple[Latency, ...]
    metrics: tuple[tuple[Metric, Metric], ...]
    disk: tuple[int, int]

    @property
    def failures(self) -> list[str]:
        """The metrics that fell more than `MAX_LOSS`."""
        return [
            f"{after.name} fell from {before.value:.4f} to {after.value:.4f}, more than {MAX_LOSS}"
            for before, after in self.metrics
            if not after.value >= before.value - MAX_LOSS  # written so that NaN fails
        ]

    def table(self) -> Table:
        """One table: speed, accuracy, size."""
        table = Table(title="all-MiniLM-L6-v2, float32 against int8")
        for heading in ("", "float32", "int8", "change"):
            table.add_column(heading, justify="right" if heading else "left")
        for item in self.latencies:
            name = f"latency, batch {item.batch} × {item.tokens} tokens"
            table.add_row(name, _ms(item.before), _ms(item.after), f"{item.speedup:.2f}× faster")
        for before, after in self.metrics:
            change = f"{after.value - before.value:+.4f}"
            table.add_row(f"{before.name} (n={before.n})", f"{before.value:.4f}", f"{after.value:.4f}", change)
        before_mb, after_mb = (size / 1e6 for size in self.disk)
        table.add_row("size on disk", f"{before_mb:.1f} MB", f"{after_mb:.1f} MB", f"{after_mb / before_mb:.2f} of it")
        return table


def run(console: Console | None = None, seconds: float = 3.0) -> DemoResult:
    """Runs the demo and prints its table.

    Args:
        console: where to print.
        seconds: how long each shape is timed.

    Raises:
        ImportError: the `demo` extra is missing. RuntimeError: the model or the data cannot be had.
    """
    console = console or Console()
    console.print(
        f"tcompress {tcompress.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU path: {cpu_path() or 'none: the C++ extension is not built, the slow torch reference runs'}"
    )
    with console.status("fetching the model and the data (once)"), _no_progress_bars():
        model, tokenizer = load_minilm()
    data = dict(tokenizer(list(CALIBRATION), padding=True, return_tensors="pt"))
    result = tcompress.compress(model, "int8", data)
    report = result.report
    console.print(f"{report.counts}; cosine of the output to float32: {report.output_cosine:.5f}")
    with console.status("measuring accuracy"):
        metrics = _metrics((model, result.model), tokenizer)
    with console.status("measuring latency, float32 and int8 in turn"):
        latencies = tuple(_latency(model, result.model, *shape, seconds) for shape in SHAPES)
    demo = DemoResult(latencies, metrics, _disk(model, result.model))
    console.print(demo.table())
    return demo


def _metrics(models: Sequence[nn.Module], tokenizer: object) -> tuple[tuple[Metric, Metric], ...]:
    encoders = [SentenceEncoder(model, tokenizer) for model in models]
    before, after = ((wordsim353_spearman(e), boolq_retrieval(e)) for e in encoders)
    return tuple(zip(before, after, strict=True))


def _latency(model: nn.Module, compressed: nn.Module, batch: int, tokens: int, seconds: float) -> Latency:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        before, after = alternate(
            [lambda: model(input_ids=ids, attention_mask=mask), lambda: compressed(input_ids=ids, attention_mask=mask)],
            seconds,
        )
    return Latency(batch, tokens, before, after)


def _disk(model: nn.Module, compressed: nn.Module) -> tuple[int, int]:
    with tempfile.TemporaryDirectory() as folder:
        with _no_progress_bars():
            model.save_pretrained(Path(folder) / "float32")  # type: ignore[operator]
        tcompress.save(compressed, Path(folder) / "int8")
        return _folder_bytes(Path(folder) / "float32"), _folder_bytes(Path(folder) / "int8")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Keeps the bars of transformers, which write over the status line, off the screen."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise ImportError(f"demo: transformers: got {error}, expected it; pip install tcompress[demo]") from error
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _ms(timing: Timing) -> str:
    return f"{timing.median * 1e3:.2f} ms"
