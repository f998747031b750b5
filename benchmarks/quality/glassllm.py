"""glassllm (a Llama of 4 layers of 128, 0.85 M parameters): perplexity on Grimm's tales.

Calibrated on the last tales, evaluated on the first ones, in windows of 128 tokens.
"""

from __future__ import annotations

import csv
import json
import math
import re
import unicodedata
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from quality import assets
from quality.subject import Scores, Subject

_CONTEXT = 128
_BATCH = 16


def load_model(file: Path) -> nn.Module:
    """The weights of the package's own implementation as `transformers.LlamaForCausalLM`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    arrays = np.load(file)
    shape = json.loads(str(arrays["__config__"]))

    def tensor(name: str) -> torch.Tensor:
        return torch.from_numpy(arrays[name].astype(np.float32))

    heads, groups = shape["n_heads"], shape["n_kv_heads"]
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["d_model"],
        intermediate_size=arrays["blocks.0.ffn.W1"].shape[1],
        num_hidden_layers=shape["n_layers"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=shape["max_len"],
        rms_norm_eps=shape["eps"],
        rope_parameters={"rope_type": "default", "rope_theta": shape["rope_base"]},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    embeddings = tensor("E")
    state = {
        "model.embed_tokens.weight": embeddings,
        "lm_head.weight": embeddings,
        "model.norm.weight": tensor("norm_f.gamma"),
    }
    for i in range(shape["n_layers"]):
        old, new = f"blocks.{i}", f"model.layers.{i}"
        state[f"{new}.input_layernorm.weight"] = tensor(f"{old}.norm1.gamma")
        state[f"{new}.post_attention_layernorm.weight"] = tensor(f"{old}.norm2.gamma")
        state[f"{new}.self_attn.q_proj.weight"] = _halves(tensor(f"{old}.attn.W_Q").T, heads)
        state[f"{new}.self_attn.k_proj.weight"] = _halves(tensor(f"{old}.attn.W_K").T, groups)
        for ours, theirs in (("v_proj", "W_V"), ("o_proj", "W_O")):
            state[f"{new}.self_attn.{ours}.weight"] = tensor(f"{old}.attn.{theirs}").T
        for ours, theirs in (("gate_proj", "W1"), ("up_proj", "W3"), ("down_proj", "W2")):
            state[f"{new}.mlp.{ours}.weight"] = tensor(f"{old}.ffn.{theirs}").T
    model = LlamaForCausalLM(config)
    model.load_state_dict(state)
    return model.eval()


def _halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a head from pairs that are rotated together, 0 1 | 2 3 | ..., to what Llama has: 0 2 ... | 1 3 ..."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def subject(tokens: int = 16384, calibration: int = 64) -> Subject:
    """The model, evaluated on `tokens`; calibrated on as many windows."""
    folder = assets.wheel_files(assets.GLASSLLM)
    model = load_model(folder / "en.npz")
    encode = Encoder(folder / "en.tokenizer.json")
    tales = _tales(assets.wheel_files(assets.GRIMM) / "grimm-tales.tab")
    windows = encode("\n\n".join(tales), tokens).reshape(-1, _CONTEXT)
    # The tales at the end, backwards, so that no tale is in both.
    last = torch.cat([encode(tale) for tale in reversed(tales[len(tales) * 3 // 4 :])])
    samples = [{"input_ids": window[None]} for window in last[: calibration * _CONTEXT].split(_CONTEXT)]

    @torch.inference_mode()
    def evaluate(compressed: nn.Module) -> Scores:
        rows = torch.cat([compressed(input_ids=w).logits[:, :-1].flatten(0, 1) for w in windows.split(_BATCH)])
        loss = float(F.cross_entropy(rows, windows[:, 1:].flatten()))
        return Scores(math.exp(loss), rows.clone())

    return Subject(
        name="glassllm",
        model=model,
        calibration=samples,
        evaluate=evaluate,
        metric="perplexity of Grimm's tales",
        counted=f"{windows.numel()} tokens, context {_CONTEXT}; calibration {len(samples)} windows",
        higher=False,
        outputs="logits",
    )


class Encoder:
    """The package's byte-pair encoding of characters: merges within a word and the spaces before it."""

    def __init__(self, file: Path) -> None:
        content = json.loads(file.read_text(encoding="utf-8"))
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(content["merges"])}
        tokens = ["<pad>", "<unk>", "<bos>", "<eos>", *content["alphabet"], *("".join(pair) for pair in self.ranks)]
        self.ids = {token: i for i, token in enumerate(tokens)}
        self.known: dict[str, list[int]] = {}

    def __call__(self, text: str, n: int | None = None) -> torch.Tensor:
        """Token ids, the first n."""
        ids: list[int] = []
        for word in re.findall(r"\n|▁*[^▁\n]+|▁+", unicodedata.normalize("NFC", text).replace(" ", "▁")):
            if word not in self.known:
                self.known[word] = [self.ids.get(part, self.ids["<unk>"]) for part in self._parts(word)]
            ids += self.known[word]
            if n is not None and len(ids) >= n:
                break
        return torch.tensor(ids[:n])

    def _parts(self, word: str) -> list[str]:
        parts = list(word)
        while True:
            pairs = [pair for pair in pairwise(parts) if pair in self.ranks]
            if not pairs:
                return parts
            best = min(pairs, key=self.ranks.__getitem__)
            merged, i = [], 0
            while i < len(parts):
                both = tuple(parts[i : i + 2]) == best
                merged.append("".join(best) if both else parts[i])
                i += 2 if both else 1
            parts = merged


def _tales(file: Path) -> list[str]:
    """Their texts, out of Orange's table: three lines of headings, then name, …, text."""
    csv.field_size_limit(10**9)
    with file.open(encoding="utf-8", newline="") as lines:
        return [row[3] for row in list(csv.reader(lines, delimiter="\t"))[3:] if len(row) > 3]
