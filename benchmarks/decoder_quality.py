"""What quantized attention and the int8 key-value cache cost a decoder: perplexity, and the first tokens it writes.

    python benchmarks/decoder_quality.py MODEL_FOLDER TEXT_FILE PROMPT_FILE [--tokens 4096] [--context 512] [--new 32]

The model is a Hugging Face folder. Perplexity is over windows of `--context` tokens of the text; of the prompts, one a
line, one counts as alike when its first `--new` greedy tokens are those of float32 with torch's attention.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import tcompress  # registers the attention "tcompress"
from tcompress.integrations import Int8Cache


def perplexity(model: Any, ids: torch.Tensor, context: int, cache: Callable[[], Any]) -> float:
    """exp of the mean negative log-likelihood of the tokens after the first of each window."""
    total, n = 0.0, 0
    for window in ids.split(context):
        if len(window) < 2:
            continue
        logits = model(window[None], past_key_values=cache(), use_cache=cache() is not None).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, window[1:], reduction="sum"))
        n += len(window) - 1
    return math.exp(total / n)


def greedy(model: Any, prompt: torch.Tensor, new: int, cache: Callable[[], Any]) -> tuple[list[int], Any]:
    """The tokens that follow, and the cache that was used."""
    used = cache()
    out = model.generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        past_key_values=used,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    return out[0, len(prompt) :].tolist(), used


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--new", type=int, default=32)
    options = parser.parse_args()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    ids = tokenizer(options.text.read_text(), return_tensors="pt").input_ids[0]
    lines = [line for line in options.prompts.read_text().splitlines() if line]
    prompts = [tokenizer(line, return_tensors="pt").input_ids[0] for line in lines]
    ids = ids[: options.tokens]

    settings: list[tuple[str, str, Callable[[], Any]]] = [
        ("torch SDPA, float cache", "sdpa", lambda: None),
        ("quantized attention, float cache", "tcompress", lambda: None),
        ("quantized attention, int8 cache", "tcompress", Int8Cache),
    ]
    table = Table(title=f"{options.model.name}: {len(ids)} tokens, context {options.context}; {len(prompts)} prompts")
    for heading in ("", "perplexity", "change", f"alike for {options.new} tokens", "cache, of float32"):
        table.add_column(heading, justify="right" if heading else "left")
    expected: list[list[int]] = []
    base = 0.0
    for name, attention, cache in settings:
        model.set_attn_implementation(attention)
        value = perplexity(model, ids, options.context, cache)
        written, used = zip(*(greedy(model, p, options.new, cache) for p in prompts), strict=True)
        if not expected:
            expected, base = list(written), value
        alike = sum(a == b for a, b in zip(written, expected, strict=True))
        size = f"{used[0].nbytes_used / used[0].float_nbytes:.3f}" if isinstance(used[0], Int8Cache) else ""
        table.add_row(name, f"{value:.4f}", f"{value / base - 1:+.3%}", f"{alike} of {len(prompts)}", size)
    Console(width=120).print(f"tcompress {tcompress.__version__}, {tcompress.backend.cpu_path()}", table)


if __name__ == "__main__":
    main()
