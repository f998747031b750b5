import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tcompress.nn.transformer_encoder import TransformerEncoder, TransformerEncoderLayer

TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-12)]
ACTIVATIONS = {
    "relu": "relu",
    "gelu": F.gelu,
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


def torch_layer(dtype=torch.float32, dropout=0.1, batch_first=True, **arguments):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=dropout, batch_first=batch_first, dtype=dtype, **arguments)
    randomise(layer)
    return layer.eval()


def torch_encoder(layer, n_layer=2, norm=None):
    encoder = nn.TransformerEncoder(layer, n_layer, norm, enable_nested_tensor=False)
    randomise(encoder)  # the layers start as clones of each other, which would hide a mixed-up order
    return encoder.eval()


def randomise(module):
    """Also biases and norms, which torch starts at 0 and 1: that would hide a lost or swapped one."""
    for name, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=0.3)


def tokens(batch=2, length=5, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(batch, length, 12, dtype=dtype)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).tril()
KEYS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
MASKS = [
    ({}, None),
    ({"src_mask": ~CAUSAL}, CAUSAL),
    ({"src_key_padding_mask": ~KEYS}, KEYS[:, None, None]),
    ({"src_mask": ~CAUSAL, "src_key_padding_mask": ~KEYS}, CAUSAL & KEYS[:, None, None]),
]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_layer_matches_torch(norm_first, activation, dtype, tolerance):
    theirs = torch_layer(dtype, activation=ACTIVATIONS[activation], norm_first=norm_first)
    ours = TransformerEncoderLayer.from_torch(theirs)
    assert ours.feed_forward.activation == activation
    x = tokens(dtype=dtype)
    for arguments, mask in MASKS:
        # With gradients on: torch's inference fast path computes GELU(approximate="tanh") as the exact GELU.
        torch.testing.assert_close(ours(x, mask), theirs(x, **arguments), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("norm_first", [False, True])
def test_layer_matches_the_fast_path_of_torch(norm_first):
    theirs = torch_layer(norm_first=norm_first)
    ours = TransformerEncoderLayer.from_torch(theirs)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arguments", [{"bias": False}, {"layer_norm_eps": 0.3}, {"batch_first": False}])
def test_layer_options(arguments):
    theirs = torch_layer(**arguments)
    ours = TransformerEncoderLayer.from_torch(theirs)
    x = tokens()
    expected = theirs(x) if theirs.self_attn.batch_first else theirs(x.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert len(list(ours.parameters())) == (8 if arguments == {"bias": False} else 16)


def test_layer_with_two_different_norms():
    theirs = torch_layer()
    theirs.norm1.eps, theirs.norm2.eps = 0.1, 0.7
    ours = TransformerEncoderLayer.from_torch(theirs)
    torch.testing.assert_close(ours(tokens()), theirs(tokens()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_layer_is_its_formula(norm_first):
    """With d_head != d_model / n_head, which torch cannot express; the parts have their own tests."""
    torch.manual_seed(0)
    layer = TransformerEncoderLayer(3, 12, 5, 20, "silu", norm_first, eps=0.2, dtype=torch.float64)
    randomise(layer)
    x = tokens(dtype=torch.float64)
    if norm_first:
        h = layer.norm1(x)
        h = x + layer.self_attn(h, h, h, CAUSAL)
        expected = h + layer.feed_forward(layer.norm2(h))
    else:
        h = layer.norm1(x + layer.self_attn(x, x, x, CAUSAL))
        expected = layer.norm2(h + layer.feed_forward(h))
    assert torch.equal(layer(x, CAUSAL), expected)
    assert layer.self_attn.q_proj.weight.shape == (15, 12)
    assert layer.norm1.eps == layer.norm2.eps == 0.2


def test_causal_mask_hides_the_future():
    layer = TransformerEncoderLayer.from_torch(torch_layer())
    x = tokens()
    changed = x.clone()
    changed[:, 3:] += 1
    y, z = layer(x, CAUSAL), layer(changed, CAUSAL)
    torch.testing.assert_close(y[:, :3], z[:, :3])
    assert (y[:, 3:] - z[:, 3:]).abs().amin(-1).gt(0).all()


def test_fully_masked_sequence_is_finite():
    ours = TransformerEncoder.from_torch(torch_encoder(torch_layer()))
    keys = KEYS.clone()
    keys[1] = False
    y = ours(tokens(), keys[:, None, None])
    assert y.isfinite().all()
    torch.testing.assert_close(y[0], ours(tokens())[0])


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_encoder_matches_torch(norm_first, final_norm, dtype, tolerance):
    norm = nn.LayerNorm(12, eps=0.1, dtype=dtype) if final_norm else None
    theirs = torch_encoder(torch_layer(dtype, norm_first=norm_first), n_layer=3, norm=norm)
    ours = TransformerEncoder.from_torch(theirs)
    x = tokens(dtype=dtype)
    arguments = [({}, None), ({"mask": ~CAUSAL}, CAUSAL), MASKS[2]]
    for keywords, mask in arguments:
        torch.testing.assert_close(ours(x, mask), theirs(x, **keywords), rtol=tolerance, atol=tolerance)
    assert not any(parameter.is_meta for parameter in ours.parameters())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_agrees_with_nested_fast_path_where_not_padded():
    layer = nn.TransformerEncoderLayer(12, 2, 20, batch_first=True)
    theirs = nn.TransformerEncoder(layer, 2).eval()
    ours = TransformerEncoder.from_torch(theirs)
    with torch.no_grad():
        expected = theirs(tokens(), src_key_padding_mask=~KEYS)
        y = ours(tokens(), KEYS[:, None, None])
    torch.testing.assert_close(y[KEYS], expected[KEYS], rtol=1e-5, atol=1e-5)


def test_encoder_constructor():
    encoder = TransformerEncoder(
        3, 2, 12, 5, 20, activation="gelu", norm_first=True, eps=0.2, final_norm=True, bias=False
    )
    assert len(encoder.layers) == 3
    for layer in encoder.layers:
        assert (layer.self_attn.n_head, layer.self_attn.d_model, layer.self_attn.d_head) == (2, 12, 5)
        assert (layer.feed_forward.d_ff, layer.feed_forward.activation) == (20, "gelu")
        assert layer.norm_first
    norms = [module for module in encoder.modules() if type(module).__name__ == "LayerNorm"]
    assert [norm.eps for norm in norms] == [0.2] * 7
    assert not any(name.endswith("bias") for name, _ in encoder.named_parameters())
    x = tokens()
    expected = x
    for layer in encoder.layers:
        expected = layer(expected, CAUSAL)
    assert torch.equal(encoder(x, CAUSAL), encoder.norm(expected))
    assert TransformerEncoder(1, 2, 12, 5, 20).norm is None


def test_encoder_fullgraph():
    encoder = TransformerEncoder.from_torch(torch_encoder(torch_layer(norm_first=True), norm=nn.LayerNorm(12)))
    compiled = torch.compile(encoder, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens(), CAUSAL), encoder(tokens(), CAUSAL))


def test_from_torch_copies_and_keeps_the_mode():
    theirs = torch_encoder(torch_layer(), norm=nn.LayerNorm(12))
    ours = TransformerEncoder.from_torch(theirs)
    before = ours(tokens())
    for parameter in theirs.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(ours(tokens()), before)
    assert not any(module.training for module in ours.modules())
    training = TransformerEncoder.from_torch(torch_encoder(torch_layer(dropout=0.0)).train())
    assert all(module.training for module in training.modules())
    layer = TransformerEncoderLayer.from_torch(torch_layer())
    assert not any(module.training for module in layer.modules())


@pytest.mark.parametrize("part", ["dropout", "dropout1", "dropout2", "self_attn"])
def test_from_torch_refuses_dropout_in_training(part):
    layer = torch_layer(dropout=0.1)
    TransformerEncoderLayer.from_torch(layer)
    getattr(layer, part).train()
    with pytest.raises(ValueError, match=r"got (dropout )?0.1,? .*call .eval\(\) first"):
        TransformerEncoderLayer.from_torch(layer)
    with pytest.raises(ValueError, match=r"call .eval\(\) first"):
        TransformerEncoder.from_torch(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))


def test_from_torch_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="activation: got"):
        TransformerEncoderLayer.from_torch(torch_layer(activation=torch.tanh))


def test_from_torch_refuses_other_classes():
    class OtherLayer(nn.TransformerEncoderLayer):
        pass

    class OtherEncoder(nn.TransformerEncoder):
        pass

    with pytest.raises(TypeError, match=r"layer: got OtherLayer"):
        TransformerEncoderLayer.from_torch(OtherLayer(12, 3))
    with pytest.raises(TypeError, match=r"encoder: got OtherEncoder"):
        TransformerEncoder.from_torch(OtherEncoder(torch_layer(), 2, enable_nested_tensor=False))
    with pytest.raises(TypeError, match="norm: got RMSNorm"):
        TransformerEncoder.from_torch(torch_encoder(torch_layer(), norm=nn.RMSNorm(12)))
    for part in ("linear1", "linear2", "norm1", "norm2", "self_attn"):
        layer = torch_layer()
        setattr(layer, part, nn.Identity())
        with pytest.raises(TypeError, match=r"got Identity"):
            TransformerEncoderLayer.from_torch(layer)


def test_rejects_bad_sizes():
    with pytest.raises(ValueError, match="TransformerEncoder: n_layer: got 0"):
        TransformerEncoder(0, 2, 12, 6, 20)
    with pytest.raises(ValueError, match=r"encoder\.layers: got none"):
        TransformerEncoder.from_torch(nn.TransformerEncoder(torch_layer(), 0, enable_nested_tensor=False))
    with pytest.raises(ValueError, match="LayerNorm: eps"):
        TransformerEncoderLayer(2, 12, 6, 20, eps=0.0)
    with pytest.raises(ValueError, match="FeedForward: activation"):
        TransformerEncoderLayer(2, 12, 6, 20, activation="tanh")
    with pytest.raises(ValueError, match=r"x: got shape|q: got shape"):
        TransformerEncoderLayer(2, 12, 6, 20)(torch.zeros(5, 12))
