import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcompress.nn.feed_forward import FeedForward, activation_name

FORMULAS = {
    "relu": lambda x: x * (x > 0),
    "gelu": lambda x: x * 0.5 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", FORMULAS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_formula(activation, bias, dtype, tolerance):
    torch.manual_seed(0)
    module = FeedForward(6, 20, activation, bias=bias, dtype=dtype)
    x = torch.randn(2, 3, 6, dtype=dtype) * 2
    weights = {name: p.double() for name, p in module.named_parameters()}
    hidden = torch.einsum("bsk,nk->bsn", x.double(), weights["linear1.weight"])
    hidden = FORMULAS[activation](hidden + weights.get("linear1.bias", 0))
    expected = torch.einsum("bsk,nk->bsn", hidden, weights["linear2.weight"])
    expected = expected + weights.get("linear2.bias", 0)
    y = module(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_default_is_relu():
    assert FeedForward(2, 3).activation == "relu"


def test_linears_can_be_swapped():
    module = FeedForward(4, 8)
    module.linear1, module.linear2 = nn.Identity(), nn.Identity()
    x = torch.randn(2, 4)
    assert torch.equal(module(x), x.relu())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (F.relu, "relu"),
        (torch.relu, "relu"),
        (nn.ReLU(), "relu"),
        (F.gelu, "gelu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (F.silu, "silu"),
        (nn.SiLU(), "silu"),
        *((name, name) for name in FORMULAS),
    ],
)
def test_activation_name(given, expected):
    assert activation_name(given) == expected


@pytest.mark.parametrize(
    "unknown",
    ["RELU", "swish", "", torch.tanh, nn.ReLU6(), nn.ReLU, functools.partial(F.gelu), lambda x: x, None],
)
def test_unknown_activation(unknown):
    with pytest.raises(ValueError, match=r"activation: got .*, expected one of relu, gelu, gelu_tanh, silu"):
        activation_name(unknown)
    with pytest.raises(ValueError, match="activation: got"):
        FeedForward(4, 8, unknown)


def test_rejects_bad_sizes():
    with pytest.raises(ValueError, match="FeedForward: d_model: got 0"):
        FeedForward(0, 8)
    with pytest.raises(ValueError, match="FeedForward: d_ff: got -1"):
        FeedForward(8, -1)
    for shape in [(2, 3), ()]:
        with pytest.raises(ValueError, match=r"FeedForward: x: got shape .* expected \[..., 4\]"):
            FeedForward(4, 8)(torch.zeros(shape))
