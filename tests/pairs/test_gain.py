"""Which modules multiply channels by a weight is found by trying."""

import pytest
import torch
import transformers as hf
from torch import nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import tcompress.nn as tcn
from tcompress.pairs.gain import gain_of, may_have_gain

X = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


def _with(module, value):
    with torch.no_grad():
        module.weight.copy_(value)
    return module


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.LayerNorm(16), "weight"),
        (nn.LayerNorm(16, bias=False), "weight"),
        (nn.RMSNorm(16), "weight"),
        (tcn.LayerNorm(16), "weight"),
        (LlamaRMSNorm(16), "weight"),
        (hf.models.t5.modeling_t5.T5LayerNorm(16), "weight"),
        (GemmaRMSNorm(16), "one_plus"),
        (nn.BatchNorm1d(16).eval(), "weight"),
        (nn.PReLU(16), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_gain(module, kind):
    assert may_have_gain(module)
    weight = torch.rand(16, generator=torch.Generator().manual_seed(1)) + 0.5
    assert gain_of(_with(module, weight), X) == kind


def test_zero_weights_are_no_proof():
    assert gain_of(_with(LlamaRMSNorm(16), 0), X) is None
    assert gain_of(_with(GemmaRMSNorm(16), 0), X) == "one_plus"


class Squared(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return x * self.weight**2


def test_another_function_of_the_weight():
    assert gain_of(Squared(), X) is None


def test_what_cannot_have_one():
    assert not may_have_gain(nn.Linear(16, 16))
    assert not may_have_gain(nn.LayerNorm((4, 16)))
    assert not may_have_gain(nn.LayerNorm(16, elementwise_affine=False))
    assert not may_have_gain(nn.LayerNorm(16, device="meta"))
