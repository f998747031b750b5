"""Named shapes of real models: what a linear layer and an attention get to do."""

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


@dataclass(frozen=True)
class SparseShape(LinearShape):
    """A linear layer of which `percent` of the weights are zero, in blocks or groups as `pattern` says:
    "unstructured", "2:4", or "RxC" of R outputs by C inputs."""

    pattern: str = "unstructured"
    percent: int = 80

    @property
    def sparsity(self) -> float:
        return self.percent / 100

    def __str__(self) -> str:
        return f"{super().__str__()}-{self.pattern}-{self.percent}%"


@dataclass(frozen=True)
class AttentionShape:
    """Batch B, H heads of the queries, Hkv of keys and values, Sq queries, Skv keys, D a head. Causal: the last query
    sees all keys, each before it one less."""

    name: str
    b: int
    h: int
    h_kv: int
    sq: int
    skv: int
    d: int
    causal: bool = False

    @property
    def macs(self) -> int:
        """Of the products Q Kᵀ and P V, for the visible pairs of a query and a key only."""
        hidden = self.sq * (self.sq - 1) // 2 if self.causal else 0
        return 2 * self.b * self.h * (self.sq * self.skv - hidden) * self.d

    def __str__(self) -> str:
        heads = str(self.h) if self.h == self.h_kv else f"{self.h}:{self.h_kv}"
        size = "x".join(map(str, (self.b, heads, self.sq, self.skv, self.d)))
        return f"{self.name}-{size}{'-causal' if self.causal else ''}"


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

#: 2:4 has one sparsity only.
PATTERNS = {"unstructured": (50, 75, 80, 90), "2:4": (50,), **dict.fromkeys(("1x4", "8x4", "16x16"), (50, 75, 80, 90))}

SPARSE_SHAPES = [
    SparseShape(layer.name, layer.m, layer.k, layer.n, pattern, percent)
    for layer in (
        *_layer("bert-base", 128, ("attention", 768, 768), ("up", 768, 3072)),
        *_layer("llama-8b", 128, ("attention", 4096, 4096)),
        *_layer("llama-8b", 1, ("attention", 4096, 4096)),
    )
    for pattern, percents in PATTERNS.items()
    for percent in percents
]

ATTENTION_SHAPES = [
    AttentionShape("minilm", 1, 12, 12, 128, 128, 32),
    AttentionShape("bert-base", 1, 12, 12, 128, 128, 64),
    AttentionShape("bert-base", 1, 12, 12, 512, 512, 64),
    AttentionShape("bert-base", 1, 12, 12, 2048, 2048, 64),
    AttentionShape("vit-small", 1, 6, 6, 257, 257, 64),
    AttentionShape("whisper-tiny", 1, 6, 6, 1500, 1500, 64),
    AttentionShape("smollm2", 1, 9, 3, 512, 512, 64, causal=True),
    AttentionShape("llama-7b", 1, 32, 32, 2048, 2048, 128, causal=True),
]

#: One new token and the cache of all before it.
DECODE_SHAPES = [
    AttentionShape("llama-8b", 1, 32, 8, 1, 4096, 128),
    AttentionShape("gpt2", 1, 12, 12, 1, 1024, 64),
    AttentionShape("smollm2", 1, 9, 3, 1, 1024, 64),
]
