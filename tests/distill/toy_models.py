"""A small Transformer of plain torch, and data for it."""

import torch
import torch.nn.functional as F
from torch import nn


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.1)

    def forward(self, x, mask=None):
        b, t, d = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if mask is None else mask[:, None, None]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(b, t, d))
        return x + self.drop(self.down(F.gelu(self.up(x))))


class Toy(nn.Module):
    def __init__(self, width=16, blocks=4, heads=2, classes=7, vocabulary=20, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary, width)
            self.layers = nn.ModuleList(Block(width, heads) for _ in range(blocks))
            self.head = nn.Linear(width, classes)

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, input_ids, attention_mask=None):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, None if attention_mask is None else attention_mask.bool())
        return self.head(x)


def batches(n=5, vocabulary=20, labels=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(n):
        ids = torch.randint(vocabulary, (4, 6), generator=generator)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        batch["attention_mask"][0, 4:] = 0
        result.append(batch | ({"labels": ids % 7} if labels else {}))
    return result
