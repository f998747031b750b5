"""llm-compressor's algorithms on the data of `algorithm_quality.py`, for comparison; in an environment of its own.

    pip install llmcompressor
    python benchmarks/algorithm_peer.py MODEL_FOLDER TEXT_FILE [--tokens 4096] [--context 512] [--samples 16]
        [--only "* gptq"] [--json results.json]

Perplexity, samples and windows are those of `algorithm_quality.py`; tcompress is not imported.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F


def settings() -> dict[str, Callable[[], list[Any]]]:
    """By name, what is done; lm_head and embeddings stay in floating point, as ours do."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
    from llmcompressor.modifiers.pruning.wanda import WandaPruningModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    def quantized(modifier: Any, weights: dict[str, Any], **options: Any) -> Callable[[], list[Any]]:
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        return lambda: [modifier(config_groups=groups, ignore=["lm_head"], **options)]

    def pruned(modifier: Any) -> Callable[[], list[Any]]:
        return lambda: [modifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"])]

    def scaled(weights: dict[str, Any]) -> Callable[[], list[Any]]:
        return lambda: [AWQModifier(), *quantized(QuantizationModifier, weights)()]

    found: dict[str, Callable[[], list[Any]]] = {}
    for name, strategy, size in (("W4A16-g64", "group", 64), ("W4A16", "channel", None)):
        weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": strategy, "group_size": size}
        found[f"{name} rtn"] = quantized(QuantizationModifier, weights)
        found[f"{name} gptq"] = quantized(GPTQModifier, weights)
        found[f"{name} gptq, by activation"] = quantized(GPTQModifier, weights, actorder="static")
        found[f"{name} awq"] = scaled(weights)
    found["50 % unstructured sparsegpt"] = pruned(SparseGPTModifier)
    found["50 % unstructured wanda"] = pruned(WandaPruningModifier)
    return found


@torch.no_grad()
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    from datasets import Dataset
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    first = 2 * options.tokens
    windows = [w.tolist() for w in ids[first:].split(options.context)[: options.samples]]
    data = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(w) for w in windows]})
    rows = []
    for name, recipe in settings().items():
        if options.only and not any(fnmatchcase(name, glob) for glob in options.only):
            continue
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
        start = time.perf_counter()
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=data,
            recipe=recipe(),
            max_seq_length=options.context,
            num_calibration_samples=len(windows),
            shuffle_calibration_samples=False,
        )
        seconds = time.perf_counter() - start
        rows.append((name, perplexity(model, ids[: options.tokens], options.context), seconds))
        print(rows[-1], flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
