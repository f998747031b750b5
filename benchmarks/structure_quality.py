"""What structured pruning and weight sharing bring and cost: a metric, the size and the latency by recipe.

    python benchmarks/structure_quality.py minilm [--only "shrink*"] [--seconds 2] [--json results.json]
    python benchmarks/structure_quality.py MODEL_FOLDER --text TEXT_FILE [--tokens 4096] [--context 512] [--samples 8]

"minilm" is the demo's sentence encoder, with the demo's two metrics; its calibration samples are texts of BoolQ that
the metric does not use. A folder holds a Hugging Face decoder, whose perplexity is taken as in `algorithm_quality.py`.
Latency is one call of a batch of 1 x 128 tokens, the model before and after in turn.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from algorithm_quality import perplexity
from rich.console import Console
from rich.table import Table

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.report.size import model_sizes
from tcompress.timing import alternate

Step = dict[str, Any]


def shrink(structure: str, ratio: float, **options: Any) -> list[Step]:
    return [{"step": "shrink", "structure": structure, "ratio": ratio, **options}]


def codebook(**options: Any) -> list[Step]:
    return [{"step": "codebook", **options}]


def low_rank(ratio: float, **options: Any) -> list[Step]:
    return [{"step": "low_rank", "ratio": ratio, **options}]


def quantize(scheme: str) -> list[Step]:
    return [{"step": "quantize", "scheme": scheme}]


#: By name, the steps of a recipe.
SETTINGS: dict[str, list[Step]] = {
    "rtn 4 bit per channel": quantize("W4A16"),
    "codebook 4 bit per row": codebook(),
    "codebook 4 bit per row, weighted": codebook(weighting="inputs"),
    "codebook 4 bit per tensor": codebook(rows=None),
    "codebook 4 bit per tensor, k-means++": codebook(rows=None, init="k-means++"),
    "codebook 4 bit per 8 rows": codebook(rows=8),
    "codebook 3 bit per row": codebook(bits=3),
    **{f"share layers by 2, {init}": [{"step": "share", "init": init}] for init in ("mean", "best")},
    "share layers by 2, best, + int8": [{"step": "share", "init": "best"}, *quantize("W8A8")],
    **{f"low rank {ratio:.0%}": low_rank(ratio) for ratio in (0.8, 0.6)},
    "low rank 80%, weights alone": low_rank(0.8, whitening="none"),
    "low rank 80% + int8": [*low_rank(0.8), *quantize("W8A8")],
    **{f"shrink channels {ratio:.0%}": shrink("channels", ratio) for ratio in (0.25, 0.5)},
    "shrink channels 25%, no repair": shrink("channels", 0.25, repair=False),
    "shrink channels 25%, weight": shrink("channels", 0.25, importance="weight"),
    "shrink channels 25%, taylor": shrink("channels", 0.25, importance="taylor"),
    "shrink channels 25%, taylor, model": shrink("channels", 0.25, importance="taylor", scope="model"),
    "shrink heads 25%": shrink("heads", 0.25),
    "shrink heads 34%": shrink("heads", 0.34),
    "shrink heads 34%, taylor": shrink("heads", 0.34, importance="taylor"),
    **{f"shrink layers {ratio:.0%}": shrink("layers", ratio) for ratio in (0.1, 0.17, 0.34)},
    "shrink channels 25% + int8": [*shrink("channels", 0.25, multiple=16), *quantize("W8A8")],
}


def minilm(options: argparse.Namespace) -> tuple[Any, list[Any], dict[str, Callable[[Any], float]]]:
    from tcompress.demo.assets import boolq
    from tcompress.demo.sentence_encoder import SentenceEncoder, load_minilm
    from tcompress.demo.tasks import boolq_retrieval, wordsim353_spearman

    model, tokenizer = load_minilm()
    texts = [text for pair in boolq(None)[1000 : 1000 + 8 * options.samples] for text in pair]
    samples = [
        dict(tokenizer(texts[i : i + 16], padding=True, truncation=True, max_length=128, return_tensors="pt"))
        for i in range(0, len(texts), 16)
    ]
    return (
        model,
        samples,
        {
            "WordSim353": lambda m: wordsim353_spearman(SentenceEncoder(m, tokenizer)).value,
            "BoolQ-300 R@1": lambda m: boolq_retrieval(SentenceEncoder(m, tokenizer)).value,
        },
    )


def decoder(options: argparse.Namespace) -> tuple[Any, list[Any], dict[str, Callable[[Any], float]]]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    windows = ids[2 * options.tokens :].split(options.context)[: options.samples]
    samples = [{"input_ids": w[None], "labels": w[None]} for w in windows]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    return model, samples, {"perplexity": lambda m: perplexity(m, ids[: options.tokens], options.context)}


@torch.inference_mode()
def latency_ratio(before: Any, after: Any, seconds: float) -> float:
    """How many times as fast the second model is, at 1 x 128 tokens."""
    ids = torch.randint(1000, 20000, (1, 128), generator=torch.Generator().manual_seed(0))
    first, second = alternate([lambda: before(input_ids=ids), lambda: after(input_ids=ids)], seconds)
    return first.median / second.median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help='"minilm", or a Hugging Face folder')
    parser.add_argument("--text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, default=8, help="batches of calibration data")
    parser.add_argument("--only", action="append", help="a glob over the settings' names; may be repeated")
    parser.add_argument("--seconds", type=float, default=2.0, help="timing of each; 0 for none")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    warnings.simplefilter("ignore", CompressionWarning)
    model, samples, metrics = (minilm if options.model == "minilm" else decoder)(options)
    size = model_sizes(model).disk
    rows: list[dict[str, Any]] = [{"name": "float32", **{k: f(model) for k, f in metrics.items()}, "MB": size / 1e6}]
    print(rows[0], flush=True)
    for name, steps in SETTINGS.items():
        if options.only and not any(fnmatchcase(name, glob) for glob in options.only):
            continue
        start = time.perf_counter()
        made = tcompress.compress(model, {"steps": steps}, samples, progress=False)
        seconds = time.perf_counter() - start
        row = {"name": name, **{k: f(made.model) for k, f in metrics.items()}, "MB": made.report.after.disk / 1e6}
        if options.seconds:
            row["x faster"] = latency_ratio(model, made.model, options.seconds)
        rows.append({**row, "seconds": seconds})
        print(rows[-1], flush=True)
    table = Table(title=f"{options.model}: {len(samples)} calibration batches, {torch.get_num_threads()} threads")
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for column in columns:
        table.add_column(column, justify="left" if column == "name" else "right")
    for row in rows:
        table.add_row(*(v if isinstance(v := row.get(c, ""), str) else f"{v:.4g}" for c in columns))
    Console(width=140).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
