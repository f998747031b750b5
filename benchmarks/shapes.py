"""Named shapes of real models: what a linear layer gets to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LinearShape:
    """M tokens, K in_features, N out_features."""

    name: str
    m: int
    k: int
    n: int

    @property
    def macs(self) -> int:
        return self.m * self.k * self.n

    def __str__(self) -> str:
        return f"{self.name}-{self.m}x{self.k}x{self.n}"


def _layer(model: str, m: int, *pairs: tuple[str, int, int]) -> list[LinearShape]:
    return [LinearShape(f"{model}.{part}", m, k, n) for part, k, n in pairs]


LINEAR_SHAPES = [
    *_layer("minilm", 32, ("attention", 384, 384)),
    *_layer("minilm", 128, ("attention", 384, 384), ("up", 384, 1536), ("down", 1536, 384)),
    *_layer("bert-base", 1, ("attention", 768, 768), ("up", 768, 3072)),
    *_layer("bert-base", 128, ("attention", 768, 768), ("up", 768, 3072), ("down", 3072, 768)),
    *_layer("bert-base", 512, ("up", 768, 3072)),
    *_layer("bert-large", 128, ("attention", 1024, 1024), ("up", 1024, 4096), ("down", 4096, 1024)),
    *_layer("bert-large", 512, ("attention", 1024, 1024), ("up", 1024, 4096), ("down", 4096, 1024)),
    *_layer("vit-base", 197, ("attention", 768, 768), ("up", 768, 3072), ("down", 3072, 768)),
    *_layer("whisper-tiny", 1500, ("attention", 384, 384), ("up", 384, 1536), ("down", 1536, 384)),
    *_layer("llama-1b", 1, ("attention", 2048, 2048), ("up", 2048, 8192), ("down", 8192, 2048)),
    *_layer("llama-1b", 16, ("up", 2048, 8192)),
    *_layer("llama-1b", 128, ("up", 2048, 8192)),
    *_layer("llama-8b", 1, ("attention", 4096, 4096), ("gate", 4096, 14336), ("head", 4096, 32000)),
    *_layer("llama-8b", 4, ("attention", 4096, 4096), ("gate", 4096, 14336)),
    *_layer("llama-8b", 16, ("attention", 4096, 4096), ("gate", 4096, 14336)),
    *_layer("llama-8b", 128, ("attention", 4096, 4096)),
]
