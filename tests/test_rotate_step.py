"""The residual stream is found and rotated where everything around it allows; the model computes the same."""

import pytest
import torch
import torch.nn.functional as F
from paired_models import change, copied, gemma, llama, randomized
from test_architectures import bert, gpt2, t5, vit, whisper
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning


def rotate(model, inputs, *steps):
    return tcompress.compress(model, {"steps": [{"step": "rotate"}, *steps]}, data=[inputs], progress=False)


def made(factory):
    torch.manual_seed(0)
    model, inputs = factory()
    return randomized(model), inputs


def test_llama():
    model, inputs = llama(tie_word_embeddings=False)
    result = rotate(model, inputs)
    assert change(model, result.model, inputs) < 1e-5
    (layer,) = result.report.layers
    assert layer.name == "model.embed_tokens"
    assert "randomized Hadamard matrix of order 48 into 5 writers and 11 readers" in layer.reason
    inner, before = result.model.model, model.model
    assert torch.equal(inner.norm.weight, torch.ones(48))
    assert not torch.allclose(inner.embed_tokens.weight, before.embed_tokens.weight)
    # Read and written in one basis: W_q diag(g) E^T is what it was.
    expected = (before.layers[0].self_attn.q_proj.weight * before.layers[0].input_layernorm.weight).double()
    got = inner.layers[0].self_attn.q_proj.weight.double() @ inner.embed_tokens.weight.double().T
    torch.testing.assert_close(got, expected @ before.embed_tokens.weight.double().T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = llama(tie_word_embeddings=False)
    model = model.to(dtype)
    result = rotate(model, inputs)
    assert result.report.layers
    assert 0 < change(model, result.model, inputs) < 40 * torch.finfo(dtype).eps


def test_a_large_channel_is_spread():
    model, inputs = llama(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] *= 100
    result = rotate(model, inputs)

    def peak(m):
        table = m.model.embed_tokens.weight.detach()
        return float((table.abs().amax(1) / table.square().mean(1).sqrt()).median())

    assert peak(model) > 6
    assert peak(result.model) < 2
    assert change(model, result.model, inputs) < 1e-5


@pytest.mark.parametrize(
    ("factory", "kind"),
    [(gemma, "Hadamard"), (gpt2, "keeps the mean"), (whisper, "keeps the mean")],
    ids=["gemma", "gpt2", "whisper"],
)
def test_others(factory, kind):
    model, inputs = made(factory)
    result = rotate(model, inputs)
    assert change(model, result.model, inputs) < 1e-4
    assert kind in result.report.layers[0].reason
    assert any("no longer shares its weight" in note for note in result.report.warnings)


def test_a_tied_head_gets_its_own_weight_and_comes_back_from_disk(tmp_path):
    model, inputs = llama(tie_word_embeddings=True)
    result = rotate(model, inputs, {"scheme": "W8A8"})
    assert result.model.lm_head.weight is not result.model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings
    assert change(model, result.model, inputs) < 0.05
    tcompress.save(result.model, tmp_path)
    assert change(result.model, tcompress.load(tmp_path), inputs) == 0


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (bert, "LayerNorm writes into it, and is no linear layer"),
        (t5, "encoder.final_layer_norm feeds more than linear layers"),
        (vit, "cat"),
    ],
    ids=["bert", "t5", "vit"],
)
def test_skipped(factory, reason):
    model, inputs = made(factory)
    expected = copied(model)
    with pytest.warns(CompressionWarning):
        result = rotate(model, inputs)
    assert any(reason in note for note in result.report.warnings)
    assert not result.report.layers
    assert all(map(torch.equal, result.model.state_dict().values(), expected.state_dict().values()))
    if factory is t5:
        assert result.model.lm_head.weight is result.model.shared.weight


class Decoder(nn.Module):
    """A residual stream with everything in sight, and what a test adds to it."""

    def __init__(self, norm=nn.RMSNorm):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.norm1, self.fc1, self.fc2 = norm(16), nn.Linear(16, 24), nn.Linear(24, 16)
        self.norm2, self.head = norm(16), nn.Linear(16, 20)

    def stream(self, ids):
        x = self.embed(ids)
        return x + self.fc2(F.gelu(self.fc1(self.norm1(x))))

    def forward(self, ids):
        return self.head(self.norm2(self.stream(ids)))


class TableRead(Decoder):
    def forward(self, ids):
        return self.head(self.norm2(self.stream(ids))) + F.linear(self.norm2.weight * 0, self.embed.weight)


class Scaled(Decoder):
    def forward(self, ids):
        return self.head(self.norm2(self.stream(ids) * torch.linspace(1, 2, 16)))


class Direct(Decoder):
    """A linear layer reads the stream without a norm."""

    def forward(self, ids):
        return self.head(self.stream(ids))


class Returning(Decoder):
    def forward(self, ids):
        x = self.stream(ids)
        return self.head(self.norm2(x)), x


class MaxNorm(nn.Module):
    """Not equivariant: divides by the largest magnitude."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        return x / x.abs().amax(-1, keepdim=True) * self.weight


IDS = torch.arange(20).view(2, 10)


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm, lambda n: nn.LayerNorm(n, bias=False)])
def test_plain_modules(norm):
    model = randomized(Decoder(norm))
    result = rotate(model, IDS)
    assert result.report.layers
    assert change(model, result.model, IDS) < 1e-5


def test_a_reader_without_a_norm():
    model = randomized(Direct())
    result = rotate(model, IDS)
    assert "2 writers and 2 readers" in result.report.layers[0].reason
    assert change(model, result.model, IDS) < 1e-5


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (TableRead(), "used outside of that too"),
        (Scaled(), "mul"),
        (Returning(), "part of the model's output"),
        (Decoder(MaxNorm), "does not commute with a rotation"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_traps(model, reason):
    with pytest.warns(CompressionWarning):
        result = rotate(randomized(model), IDS)
    assert not result.report.layers
    assert any(reason in note for note in result.report.warnings), result.report.warnings


def test_seed():
    model, inputs = llama()
    tables = [
        tcompress.compress(model, {"steps": [{"step": "rotate", "seed": seed}]}, data=[inputs]).model.model.embed_tokens
        for seed in (0, 0, 1)
    ]
    assert torch.equal(tables[0].weight, tables[1].weight)
    assert not torch.equal(tables[0].weight, tables[2].weight)


def test_no_data():
    with pytest.raises(ValueError, match="calibration samples"):
        tcompress.compress(Decoder(), {"steps": [{"step": "rotate"}]})
