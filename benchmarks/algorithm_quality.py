"""What algorithms that look at data bring a decoder: perplexity by recipe.

    python benchmarks/algorithm_quality.py MODEL_FOLDER TEXT_FILE [--tokens 4096] [--context 512] [--samples 16]
        [--only "* gptq"] [--json results.json]

The model is a Hugging Face folder. Perplexity is over the text's first `--tokens` tokens in windows of `--context`;
calibration samples are windows as long from the text after twice as many, so that no document is in both.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import time
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import tcompress


def quantize(scheme: str, algorithm: str, **options: Any) -> dict[str, Any]:
    return {"step": "quantize", "scheme": scheme, "algorithm": algorithm, **options}


def prune(pattern: str, algorithm: str) -> dict[str, Any]:
    step = {"step": "prune", "pattern": pattern, "algorithm": algorithm}
    return step if ":" in pattern else {**step, "sparsity": 0.5}


def before(step: dict[str, Any], scheme: str, algorithm: str) -> list[list[dict[str, Any]]]:
    """A step that leaves the model in floating point, and the quantization after it, in one recipe."""
    return [[step, quantize(scheme, algorithm)]]


#: What finds the integers of weights: "gptq range=minmax sweeps=0" is the paper's.
WEIGHTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("rtn", {}),
    ("rtn", {"range": "mse"}),
    ("hqq", {}),
    ("gptq", {"range": "minmax", "sweeps": 0}),
    ("gptq", {"sweeps": 0}),
    ("gptq", {}),
    ("gptq", {"propagation": 0.5}),
    ("autoround", {}),
)
#: By name, the recipes that are applied one after the other.
SETTINGS: dict[str, list[list[dict[str, Any]]]] = {
    **{
        f"{scheme} {a}{''.join(f' {name}={value}' for name, value in options.items())}": [
            [quantize(scheme, a, **options)]
        ]
        for scheme in ("W4A16-g32", "W4A16-g64", "W4A16-g128", "W4A16")
        for a, options in WEIGHTS
    },
    **{
        f"W8A8 rtn{f' outliers={outliers}' if outliers else ''}": [[quantize("W8A8", "rtn", outliers=outliers)]]
        for outliers in (None, 8, 4, 3)
    },
    **{
        f"{scheme} {step} + {a}": before({"step": step}, scheme, a)
        for scheme in ("W4A16-g64", "W4A16-g128", "W4A16")
        for step in ("awq", "rotate")
        for a in ("rtn", "gptq")
    },
    **{
        f"{scheme} rotate + awq + {a}": [[{"step": "rotate"}, {"step": "awq"}, quantize(scheme, a)]]
        for scheme in ("W4A16-g128", "W4A16")
        for a in ("rtn", "gptq")
    },
    "W8A8 smooth + rtn": before({"step": "smooth"}, "W8A8", "rtn"),
    "W8A8 smooth norm + rtn": before({"step": "smooth", "sources": "norm"}, "W8A8", "rtn"),
    "W8A8 smooth auto + rtn": before({"step": "smooth", "alpha": "auto"}, "W8A8", "rtn"),
    "W8A8 rotate + rtn": before({"step": "rotate"}, "W8A8", "rtn"),
    **{
        f"50 % {pattern} {a}": [[prune(pattern, a)]]
        for pattern in ("unstructured", "2:4", "1x4", "8x4")
        for a in ("magnitude", "wanda", "sparsegpt")
    },
    "50 % unstructured sparsegpt + W4A16-g128 gptq, together": [
        [prune("unstructured", "sparsegpt"), quantize("W4A16-g128", "gptq")]
    ],
    "50 % unstructured sparsegpt, then W4A16-g128 gptq": [
        [prune("unstructured", "sparsegpt")],
        [quantize("W4A16-g128", "gptq")],
    ],
    "50 % unstructured sparsegpt, then W4A16-g128 rtn": [
        [prune("unstructured", "sparsegpt")],
        [quantize("W4A16-g128", "rtn")],
    ],
    "50 % unstructured magnitude + W4A16-g128 rtn": [
        [prune("unstructured", "magnitude"), quantize("W4A16-g128", "rtn")]
    ],
}


@torch.inference_mode()
def perplexity(model: Any, ids: torch.Tensor, context: int) -> float:
    """exp of the mean negative log-likelihood of the tokens after the first of each window."""
    total, n = 0.0, 0
    for window in ids.split(context):
        logits = model(window[None]).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        n += len(window) - 1
    return math.exp(total / n)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--only", action="append", help="a glob over the settings' names; may be repeated")
    parser.add_argument("--inputs", default="compressed", help="Recipe.inputs")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    first = 2 * options.tokens
    samples = [{"input_ids": w[None]} for w in ids[first:].split(options.context)[: options.samples]]
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    base = perplexity(model, ids[: options.tokens], options.context)
    rows = [("float32", base, 0.0)]
    print(rows[0], flush=True)
    for name, recipes in SETTINGS.items():
        if options.only and not any(fnmatchcase(name, glob) for glob in options.only):
            continue
        compressed, start = model, time.perf_counter()
        for steps in recipes:
            recipe = {"steps": steps, "inputs": options.inputs}
            compressed = tcompress.compress(compressed, recipe, data=samples, progress=False).model
        seconds = time.perf_counter() - start
        rows.append((name, perplexity(compressed, ids[: options.tokens], options.context), seconds))
        print(rows[-1], flush=True)
    title = f"{options.model.name}: {options.tokens} tokens, context {options.context}; {len(samples)} samples"
    table = Table(title=title)
    for heading in ("", "perplexity", "change", "seconds"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value, seconds in rows:
        table.add_row(name, f"{value:.2f}", f"{value / base - 1:+.1%}", f"{seconds:.0f}")
    Console(width=120).print(table)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"tcompress {tcompress.__version__}; the process took up to {peak / 1e9:.2f} GB, its libraries included")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
