"""How much of what pruning, or shared layers, and int8 cost a sentence encoder comes back by distillation, and when.

    python benchmarks/healing.py [--patterns 8x4 1x4] [--share 2 3] [--sparsity 0.5] [--algorithm sparsegpt]
        [--steps 120] [--lr 3e-4] [--losses hidden cosine] [--text FILE] [--checkpoint FOLDER] [--json results.json]

all-MiniLM-L6-v2 is pruned, or layers that follow one another are made to share their weights, and then, once as it is
and once after learning its own outputs again, quantized by the preset "int8". Judged on the demo's tasks: WordSim-353,
and retrieval of the passages of BoolQ's first 300 questions. It learns from BoolQ's other questions and passages, from
their words one by one, and from the paragraphs of --text. Needs `pip install tcompress[demo,train]`. A run with
--checkpoint that is stopped goes on where it was.
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
from tcompress.distill.trainer import History
from tcompress.recipe import Recipe

#: Questions of BoolQ that are evaluated; the others are learned from.
EVALUATED = 300
#: Texts of a batch by kind, for about as many tokens.
BATCH = {"passages": 4, "questions": 32, "words": 64}


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


def ways(options: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]]]:
    """What the model is made smaller by: by a short name, a long one and the step."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for pattern in options.patterns:
        step = {"step": "prune", "pattern": pattern, "sparsity": options.sparsity, "algorithm": options.algorithm}
        found[pattern] = f"{options.sparsity:.0%} {pattern} {options.algorithm}", step
    for group in options.share:
        step = {"step": "share", "group": group, "init": options.init}
        found[f"share{group}"] = f"{group} layers share, {options.init}", step
    return found


def healed(
    smaller: nn.Module,
    model: nn.Module,
    tokenizer: Any,
    data: Any,
    before: dict[str, float],
    options: argparse.Namespace,
) -> History:
    """Trains the smaller model with simulated integers, and gives the curve of what it is when it is packed."""
    start = time.perf_counter()
    evaluations = 0

    def judge(student: nn.Module) -> dict[str, float]:
        nonlocal evaluations
        evaluations += 1
        if evaluations == 1:  # before training it is what it was
            return before
        found = metrics(packed(student, data), tokenizer)
        print(f"  {time.perf_counter() - start:.0f} s: {found}", flush=True)
        return found

    losses = [{"loss": "cosine", "pooled": True} if name == "cosine" else name for name in options.losses]
    checkpoint = None if options.checkpoint is None else f"{options.checkpoint}/{options.way}"
    return tcompress.distill(
        smaller,
        model,
        data,
        recipe=Recipe.load("int8"),
        evaluate=judge,
        losses=losses,
        steps=options.steps,
        lr=options.lr,
        warmup=0.05,
        eval_every=options.eval_every,
        save_every=20,
        seed=options.seed,
        ignore=["Embedding"],
        checkpoint=checkpoint,
    ).history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--patterns", nargs="*", default=["8x4", "1x4"], help="of zeros")
    parser.add_argument("--share", nargs="*", type=int, default=[], help="how many layers share")
    parser.add_argument("--init", default="best", help="what shared layers begin with: best or mean")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--algorithm", default="sparsegpt")
    parser.add_argument("--samples", type=int, default=32, help="batches that the algorithm sees")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--losses", nargs="+", default=["hidden", "cosine"])
    parser.add_argument("--eval-every", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="more text, a paragraph a line")
    parser.add_argument("--checkpoint", type=str, help="a folder")
    parser.add_argument("--json", type=Path, help="results; float32 and int8 are taken from one that is there")
    options = parser.parse_args()

    model, tokenizer = load_minilm()
    data = batches(tokenizer, texts(options.text))
    calibration = data[: options.samples]
    rows: list[tuple[str, dict[str, float]]] = []

    def add(name: str, found: dict[str, float]) -> dict[str, float]:
        rows.append((name, found))
        print(rows[-1], flush=True)
        return found

    known = dict(json.loads(options.json.read_text())["rows"]) if options.json and options.json.exists() else {}
    base = add("float32", known.get("float32") or metrics(model, tokenizer))
    add("int8", known.get("int8") or metrics(packed(model, data), tokenizer))
    results: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
    for way, (name, step) in ways(options).items():
        options.way = way
        smaller = tcompress.compress(model, {"steps": [step]}, data=calibration, progress=False).model
        before = add(f"{name}, int8", metrics(packed(smaller, data), tokenizer))
        start = time.perf_counter()
        history = healed(smaller, model, tokenizer, data, before, options)
        seconds = time.perf_counter() - start
        for step_, found in history.metrics[1:-1]:
            rows.append((f"  {step_} steps", found))
        after = add(f"{name}, healed in {options.steps} steps, int8", history.metrics[-1][1])
        part = {k: (after[k] - before[k]) / (base[k] - before[k]) for k in base if base[k] > before[k]}
        add("  part of the loss that came back", part)
        results[way] = {"curve": history.metrics, "losses": history.losses, "seconds": seconds}
        if options.json:
            options.json.write_text(json.dumps(results | {"rows": rows}, indent=1) + "\n")
    table = Table(title=f"all-MiniLM-L6-v2; {len(data)} batches to learn from, {EVALUATED} questions, 353 pairs")
    for heading in ("", *base):
        table.add_column(heading, justify="right" if heading else "left")
    for name, values in rows:
        table.add_row(name, *(f"{values[k]:.4f}" if k in values else "-" for k in base))
    Console(width=120).print(table)


def packed(model: nn.Module, data: Sequence[Any]) -> nn.Module:
    """By the preset "int8"; a few batches are enough to judge its attention by."""
    return tcompress.compress(model, "int8", data=list(data[:4]), progress=False).model


if __name__ == "__main__":
    main()
