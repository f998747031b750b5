"""Models whose pairs are known, and the plain way to say what scales do to them."""

from __future__ import annotations

import copy

import torch
import transformers as hf
from torch import nn

from tcompress.activations import tensors_in
from tcompress.calibrate import evaluating, run


def ids(batch=2, length=12):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(5))


def randomized(model, seed=0):
    """In evaluation mode, with norm weights and biases that are no ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def llama(**changes):
    config = hf.LlamaConfig(
        **{
            "vocab_size": 96,
            "hidden_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 80,
            **changes,
        }
    )
    torch.manual_seed(0)
    return randomized(hf.LlamaForCausalLM(config)), {"input_ids": ids()}


def gemma():
    config = hf.GemmaConfig(
        vocab_size=96,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        intermediate_size=80,
    )
    torch.manual_seed(0)
    return randomized(hf.GemmaForCausalLM(config)), {"input_ids": ids()}


def outputs(model, inputs):
    with evaluating(model):
        return list(tensors_in(run(model, inputs)))


def change(model, other, inputs):
    """The largest difference between two models' outputs, relative to each output's norm."""
    pairs = zip(outputs(model, inputs), outputs(other, inputs), strict=True)
    return max(float((a - b).double().norm() / a.double().norm().clamp_min(1e-30)) for a, b in pairs)


def copied(model):
    return copy.deepcopy(model)


class Block(nn.Module):
    """y = fc2(f(fc1(norm(x)))), and what a test adds to it."""

    def __init__(self, f, norm=None, size=8, inner=16):
        super().__init__()
        self.norm = nn.LayerNorm(size) if norm is None else norm
        self.fc1, self.fc2 = nn.Linear(size, inner), nn.Linear(inner, size)
        self.f = f

    def forward(self, x):
        return self.fc2(self.f(self.fc1(self.norm(x))))
