import pytest
import torch
from torch import nn

from tcompress.nn.layer_norm import LayerNorm


def layer_norm_float64(x, weight, bias, eps):
    x, weight, bias = x.double(), weight.double(), bias.double()
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    variance = (centred**2).sum(-1, keepdim=True) / x.shape[-1]
    return centred / (variance + eps) ** 0.5 * weight + bias


@pytest.mark.parametrize("shape", [(2, 3, 8), (5, 7), (1,), (0, 8), (2, 3, 4, 13)])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-13)])
def test_formula(shape, eps, dtype, tolerance):
    torch.manual_seed(0)
    norm = LayerNorm(shape[-1], eps, dtype=dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(shape, dtype=dtype) * 3 + 1
    y = norm(x)
    assert y.dtype == dtype
    expected = layer_norm_float64(x, norm.weight, norm.bias, eps)
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)


def test_defaults_are_identity_scale_and_zero_shift():
    norm = LayerNorm(4)
    assert norm.eps == 1e-5
    assert torch.equal(norm.weight, torch.ones(4))
    assert torch.equal(norm.bias, torch.zeros(4))


def test_constant_token_is_finite():
    assert torch.equal(LayerNorm(8)(torch.full((1, 1, 8), 7.0)), torch.zeros(1, 1, 8))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_spoils_its_own_token_only(bad):
    x = torch.randn(2, 4)
    x[0, 1] = bad
    y = LayerNorm(4)(x)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("eps", [0.0, -1e-5, float("nan"), float("inf")])
def test_eps_must_be_positive_and_finite(eps):
    with pytest.raises(ValueError, match=r"LayerNorm: eps: got .* expected a positive finite number"):
        LayerNorm(8, eps)


def test_rejects_bad_sizes():
    with pytest.raises(ValueError, match="LayerNorm: d_model: got 0"):
        LayerNorm(0)
    for shape in [(2, 7), (), (8, 1)]:
        with pytest.raises(ValueError, match=r"LayerNorm: x: got shape .* expected \[..., 8\]"):
            LayerNorm(8)(torch.zeros(shape))


@pytest.mark.parametrize(
    "arguments", [{}, {"eps": 0.1}, {"bias": False}, {"elementwise_affine": False}, {"dtype": torch.float64}]
)
def test_from_torch(arguments):
    torch.manual_seed(0)
    theirs = nn.LayerNorm(8, **arguments).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 8, dtype=arguments.get("dtype"))
    ours = LayerNorm.from_torch(theirs)
    assert torch.equal(ours(x), theirs(x))
    assert not ours.training
    assert (ours.bias is None) == (theirs.bias is None)


def test_from_torch_copies():
    theirs = nn.LayerNorm(8)
    ours = LayerNorm.from_torch(theirs)
    nn.init.constant_(theirs.weight, 5.0)
    assert torch.equal(ours.weight, torch.ones(8))
    assert ours.weight.requires_grad


def test_from_torch_refuses_what_it_cannot_copy():
    with pytest.raises(ValueError, match="normalized_shape"):
        LayerNorm.from_torch(nn.LayerNorm((2, 8)))
    with pytest.raises(TypeError, match="got RMSNorm"):
        LayerNorm.from_torch(nn.RMSNorm(8))
