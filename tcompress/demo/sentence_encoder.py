"""Sentence embeddings from a BERT-type encoder: masked mean pooling and L2 normalisation.

The recipe of Sentence-BERT (Reimers and Gurevych 2019, section 3), which all-MiniLM-L6-v2 was trained for:

    e = (sum_t mask[t] * h[t]) / (sum_t mask[t]),    embedding = e / |e|
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn

from tcompress.demo import assets


def load_minilm() -> tuple[nn.Module, Any]:
    """all-MiniLM-L6-v2 in float32 and eval mode, and its tokenizer; the network only ever fills the cache.

    Raises:
        ImportError: transformers is missing.
        RuntimeError: the model is not cached and could not be downloaded.
    """
    try:
        from transformers import AutoModel, AutoTokenizer
    except ImportError as err:
        raise ImportError(f"demo: transformers: got {err}, expected it; pip install tcompress[demo]") from err
    folder = assets.minilm_dir()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModel.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.eval(), tokenizer


@dataclass(frozen=True)
class SentenceEncoder:
    """Texts in, one unit vector for each out; the model runs as it is, on the device where it lies.

    Args:
        model: a transformers encoder, or a compressed one, called as ``model(input_ids=, attention_mask=)``,
            int64 [B, T] each; the answer's ``last_hidden_state`` is [B, T, D].
        tokenizer: its tokenizer: ``tokenizer(texts)["input_ids"]`` and ``pad_token_id``.
        max_length: longer texts are cut to this many tokens. MiniLM's own limit is 256; on the demo's
            retrieval task 128 saves a fifth of the time and loses one hit in 300 (fp32 R@1 .930, not .933).
        batch_tokens: a batch holds at most this many tokens, padding included (and at least one text).
    """

    model: nn.Module
    tokenizer: Any
    max_length: int = 128
    batch_tokens: int = 2048

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """Embed ``texts``: float32 [len(texts), D] on the CPU, in the order of ``texts``.

        Raises:
            ValueError: no text, or the model is in training mode (its dropout would make the numbers noise).
        """
        if not texts:
            raise ValueError("demo: encode: texts: got none, expected 1 or more; pass a list of strings")
        if self.model.training:
            raise ValueError("demo: encode: model: got training mode, expected eval; call model.eval()")
        tokens: list[list[int]] = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        indices, parts = [], []
        for batch in self._batches([len(ids) for ids in tokens]):
            indices += batch
            parts.append(self._embed([tokens[i] for i in batch]))
        sorted_rows = torch.cat(parts)
        rows = torch.empty_like(sorted_rows)
        rows[torch.tensor(indices)] = sorted_rows
        return rows

    def _batches(self, lengths: list[int]) -> Iterator[list[int]]:
        """Indices by rising length, so that a batch pads little; its last text is its longest."""
        batch: list[int] = []
        for i in sorted(range(len(lengths)), key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[i] > self.batch_tokens:
                yield batch
                batch = []
            batch.append(i)
        yield batch

    def _embed(self, tokens: list[list[int]]) -> torch.Tensor:
        width = max(map(len, tokens))
        ids = torch.full((len(tokens), width), self.tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(tokens):
            ids[row, : len(text)] = torch.tensor(text)
            mask[row, : len(text)] = 1
        device = self._device()
        ids, mask = ids.to(device), mask.to(device)
        hidden = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weight = mask[..., None].float()
        mean = (hidden * weight).sum(1) / weight.sum(1)
        return nn.functional.normalize(mean, dim=-1).cpu()

    def _device(self) -> torch.device:
        # A compressed model may keep everything in buffers.
        tensor = next(chain(self.model.parameters(), self.model.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device
