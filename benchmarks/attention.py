"""The attentions that are compared: what they get, and what they should give."""

from __future__ import annotations

import torch
from problem import Problem
from shapes import AttentionShape


class Attention(Problem[AttentionShape]):
    """`softmax(q kᵀ / √D) v`, causal or not; the error is Σ|Δ| / Σ|O|, and the cosine of both results is beside it."""

    def inputs(self, shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]:
        """q, k and v are normal."""
        generator = torch.Generator().manual_seed(0)
        sizes = (shape.h, shape.sq), (shape.h_kv, shape.skv), (shape.h_kv, shape.skv)
        q, k, v = (torch.randn(shape.b, heads, tokens, shape.d, generator=generator) for heads, tokens in sizes)
        return q, k, v, shape.causal

    def expected(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        """Head by head: the scores of all at once would not fit into memory."""
        groups, (tokens, d) = q.shape[1] // k.shape[1], q.shape[2:]
        hidden = torch.ones(tokens, k.shape[2], dtype=torch.bool).triu(k.shape[2] - tokens + 1) if causal else None
        y = torch.empty(q.shape, dtype=torch.float64)
        for i in range(q.shape[0]):
            for h in range(q.shape[1]):
                scores = q[i, h].double() @ k[i, h // groups].double().t() / d**0.5
                if hidden is not None:
                    scores.masked_fill_(hidden, -torch.inf)
                y[i, h] = scores.softmax(1) @ v[i, h // groups].double()
        return y

    def errors(self, got: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
        got = got.double()
        cosine = torch.nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0)
        return {
            "relative_error": float((got - expected).abs().sum() / expected.abs().sum()),
            "cosine": float(cosine),
        }
