"""How much of what pruning and int8 cost a sentence encoder comes back by distillation, and in how many steps.

    python benchmarks/healing.py [--pattern 8x4] [--sparsity 0.5] [--algorithm sparsegpt] [--steps 200] [--lr 2e-4]
        [--losses hidden cosine] [--text FILE] [--checkpoint FOLDER] [--json results.json]

all-MiniLM-L6-v2 is pruned, and then, once as it is and once after learning its own outputs again, quantized by the preset
"int8". Judged on the demo's tasks: WordSim-353, and retrieval of the passages of BoolQ's first 300 questions. It learns
from BoolQ's other questions and passages, from their words one by one, and from the paragraphs of --text. Needs
`pip install tcompress[demo,train]`. A run with --checkpoint that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import tcompress
from tcompress.demo import assets
from tcompress.demo.sentence_encoder import SentenceEncoder, load_minilm
from tcompress.demo.tasks import boolq_retrieval, wordsim353_spearman
from tcompress.recipe import Quantize, Recipe

#: Questions of BoolQ that are evaluated; the others are learned from.
EVALUATED = 300
#: Texts of a batch by kind, for about as many tokens.
BATCH = {"passages": 8, "questions": 64, "words": 128}


def texts(extra: Path | None) -> dict[str, list[str]]:
    """What is learned from, by kind; nothing that is evaluated."""
    pairs = assets.boolq(None)
    taken = {passage for _, passage in pairs[:EVALUATED]}
    passages = sorted({passage for _, passage in pairs[EVALUATED:]} - taken)
    if extra is not None:
        passages += [line for line in extra.read_text().splitlines() if len(line) > 200]
    questions = sorted({question for question, _ in pairs[EVALUATED:]})
    words = sorted({word for text in passages for word in text.lower().split() if word.isalpha()})
    return {"passages": passages, "questions": questions, "words": words}


def batches(tokenizer: Any, by_kind: Mapping[str, Sequence[str]], seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Padded batches of one kind each, at most 128 tokens a text, in a shuffled order."""
    shuffle = random.Random(seed)
    result = []
    for kind, size in BATCH.items():
        order = list(by_kind[kind])
        shuffle.shuffle(order)
        for i in range(0, len(order) - size + 1, size):
            found = tokenizer(order[i : i + size], padding=True, truncation=True, max_length=128, return_tensors="pt")
            result.append({key: found[key] for key in ("input_ids", "attention_mask")})
    shuffle.shuffle(result)
    return result


def metrics(model: nn.Module, tokenizer: Any) -> dict[str, float]:
    encoder = SentenceEncoder(model, tokenizer)
    retrieval = boolq_retrieval(encoder, EVALUATED)
    assert retrieval.second is not None
    wordsim = wordsim353_spearman(encoder).value
    return {"WordSim353": wordsim, "BoolQ R@1": retrieval.value, "BoolQ MRR@10": retrieval.second.value}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pattern", default="8x4")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--algorithm", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=32, help="batches that the algorithm sees")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--losses", nargs="+", default=["hidden", "cosine"])
    parser.add_argument("--eval-every", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="more text, a paragraph a line")
    parser.add_argument("--checkpoint", type=str)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    model, tokenizer = load_minilm()
    data = batches(tokenizer, texts(options.text))
    int8 = Recipe.load("int8")
    prune = {
        "step": "prune",
        "pattern": options.pattern,
        "sparsity": options.sparsity,
        "algorithm": options.algorithm,
    }
    rows: list[tuple[str, dict[str, float]]] = []

    def add(name: str, compressed: nn.Module) -> None:
        rows.append((name, metrics(compressed, tokenizer)))
        print(rows[-1], flush=True)

    calibration = data[: options.samples]
    add("float32", model)
    add("int8", tcompress.compress(model, int8, data=calibration[:4], progress=False).model)
    pruned = tcompress.compress(model, {"steps": [prune]}, data=calibration, progress=False).model
    add(f"50 % {options.pattern} {options.algorithm} + int8", _packed(pruned, int8, calibration))

    def judge(student: nn.Module) -> dict[str, float]:
        found = metrics(student, tokenizer)
        print(f"  {time.perf_counter() - start:.0f} s: {found}", flush=True)
        return found

    start = time.perf_counter()
    result = tcompress.distill(
        pruned,
        model,
        data,
        recipe=int8,
        evaluate=judge,
        losses=[{"loss": "cosine", "pooled": True} if name == "cosine" else name for name in options.losses],
        steps=options.steps,
        lr=options.lr,
        eval_every=options.eval_every,
        save_every=options.eval_every,
        seed=options.seed,
        ignore=["Embedding"],
        checkpoint=options.checkpoint,
    )
    seconds = time.perf_counter() - start
    add(f"the same, healed in {options.steps} steps, int8", _packed(result.model, int8, calibration))
    table = Table(title=f"all-MiniLM-L6-v2, {len(data)} batches to learn from, {seconds:.0f} s of training")
    for heading in ("", *rows[0][1]):
        table.add_column(heading, justify="right" if heading else "left")
    curve = [(f"  step {step} (simulated)", values) for step, values in result.history.metrics]
    for name, values in [*rows[:-1], *curve, rows[-1]]:
        table.add_row(name, *(f"{value:.4f}" for value in values.values()))
    recovered = {
        name: (rows[-1][1][name] - rows[2][1][name]) / (rows[0][1][name] - rows[2][1][name])
        for name in rows[0][1]
        if rows[0][1][name] > rows[2][1][name]
    }
    table.add_row("part of the loss recovered", *(f"{recovered.get(name, float('nan')):.0%}" for name in rows[0][1]))
    Console(width=120).print(table)
    if options.json:
        content = {"rows": rows, "curve": result.history.metrics, "losses": result.history.losses}
        options.json.write_text(json.dumps(content | {"seconds": seconds, "options": str(options)}, indent=1) + "\n")


def _packed(model: nn.Module, recipe: Recipe, data: Sequence[Any]) -> nn.Module:
    """Without the comparison of layers but for the attention, which decides by a few batches."""
    assert all(isinstance(step, Quantize) for step in recipe.steps)
    return tcompress.compress(model, recipe, data=list(data[:4]), progress=False).model


if __name__ == "__main__":
    main()
