"""Pairs are found from what models compute: each architecture's known ones, and no more; traps end with a reason."""

import pytest
import torch
import torch.nn.functional as F
from paired_models import Block, change, copied, gemma, llama, outputs, randomized
from test_architectures import bert, gpt2, t5, vit, whisper
from torch import nn

import tcompress.nn as tcn
from tcompress.pairs import find_pairs, fold


def made(factory):
    torch.manual_seed(0)
    model, inputs = factory()
    return randomized(model), inputs


def found(model, inputs):
    """Readers by source, as names, and reasons."""
    pairs, skipped = find_pairs(model, inputs)
    return {p.name: {c.name for c in p.consumers} for p in pairs}, {s.name: s.reason for s in skipped}


def test_llama():
    model, inputs = llama()
    pairs, reasons = found(model, inputs)
    expected = {"model.norm": {"lm_head"}}
    for i in range(2):
        layer = f"model.layers.{i}"
        expected |= {
            f"{layer}.input_layernorm": {f"{layer}.self_attn.{x}_proj" for x in "qkv"},
            f"{layer}.self_attn.v_proj": {f"{layer}.self_attn.o_proj"},
            f"{layer}.post_attention_layernorm": {f"{layer}.mlp.gate_proj", f"{layer}.mlp.up_proj"},
            f"{layer}.mlp.up_proj": {f"{layer}.mlp.down_proj"},
        }
    assert pairs == expected
    assert "silu" in reasons["model.layers.0.mlp.gate_proj"]
    assert "added" in reasons["model.layers.0.mlp.down_proj"]
    assert "output" in reasons["lm_head"]


def test_repeated_heads_map_to_the_channel_that_they_repeat():
    model, inputs = llama(num_attention_heads=6, num_key_value_heads=2)
    pair = next(p for p in find_pairs(model, inputs)[0] if p.name.endswith("layers.0.self_attn.v_proj"))
    channels = torch.arange(pair.size).view(2, 8)  # key and value heads of 8
    expected = channels.repeat_interleave(3, 0).flatten()
    assert torch.equal(pair.consumers[0].channels, expected)


def test_gemma_scales_by_one_plus_its_weight():
    model, inputs = gemma()
    kinds = {p.name: p.kind for p in find_pairs(model, inputs)[0]}
    assert kinds["model.layers.0.input_layernorm"] == "one_plus"
    assert kinds["model.layers.1.mlp.up_proj"] == "linear"


def test_bert_adds_its_norms_to_the_residual():
    pairs, reasons = found(*made(bert))
    layer = "encoder.layer.{}.attention"
    expected = {layer.format(i) + ".self.value": {layer.format(i) + ".output.dense"} for i in range(2)}
    assert pairs == expected
    assert "added" in reasons["encoder.layer.0.attention.output.LayerNorm"]
    assert "gelu" in reasons["encoder.layer.0.intermediate.dense"]


def test_gpt2():
    pairs, reasons = found(*made(gpt2))
    expected = {}
    for i in range(2):
        expected |= {f"transformer.h.{i}.ln_1": {f"transformer.h.{i}.attn.c_attn"}}
        expected |= {f"transformer.h.{i}.attn.c_attn": {f"transformer.h.{i}.attn.c_proj"}}
        expected |= {f"transformer.h.{i}.ln_2": {f"transformer.h.{i}.mlp.c_fc"}}
    assert pairs == expected
    assert "transformer.wte" in reasons["transformer.ln_f"]


def test_values_of_a_layer_that_gives_queries_and_keys_too():
    model, inputs = made(gpt2)
    pair = next(p for p in find_pairs(model, inputs)[0] if p.name.endswith("h.0.attn.c_attn"))
    assert pair.size == 3 * 64
    assert pair.consumers[0].channels.tolist() == list(range(128, 192))
    before = model.transformer.h[0].attn.c_attn.weight.clone()
    fold(pair, torch.full((192,), 4.0))
    after = model.transformer.h[0].attn.c_attn.weight
    assert torch.equal(after[:, :128], before[:, :128])
    assert torch.equal(after[:, 128:], before[:, 128:] / 4)


def test_t5():
    pairs, _ = found(*made(t5))
    attention = "decoder.block.0.layer.1.EncDecAttention"
    assert pairs[f"{attention}.v"] == {f"{attention}.o"}
    assert pairs["decoder.block.0.layer.1.layer_norm"] == {f"{attention}.q"}
    dense = "encoder.block.1.layer.1.DenseReluDense"
    assert pairs[f"{dense}.wi"] == {f"{dense}.wo"}
    assert len(pairs) == 20


def test_vit_and_whisper():
    pairs, _ = found(*made(vit))
    assert pairs["layers.0.layernorm_after"] == {"layers.0.mlp.fc1"}
    assert len(pairs) == 6
    pairs, reasons = found(*made(whisper))
    assert len(pairs) == 16
    assert "output" in reasons["model.encoder.layer_norm"]


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder(norm_first):
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=norm_first, batch_first=True)
    model = randomized(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    pairs, reasons = found(model, torch.randn(2, 5, 16))
    expected = {f"layers.{i}.linear1": {f"layers.{i}.linear2"} for i in range(2)}
    if norm_first:
        expected |= {f"layers.{i}.norm2": {f"layers.{i}.linear1"} for i in range(2)}
    assert pairs == expected
    assert reasons["layers.0.norm1"]  # read by MultiheadAttention without a layer


def test_own_encoder():
    model = randomized(tcn.TransformerEncoder(1, 2, 16, 8, 32, norm_first=True))
    pairs, _ = found(model, torch.randn(2, 5, 16))
    attention, network = "layers.0.self_attn", "layers.0.feed_forward"
    assert pairs == {
        "layers.0.norm1": {f"{attention}.{x}_proj" for x in "qkv"},
        f"{attention}.v_proj": {f"{attention}.o_proj"},
        "layers.0.norm2": {f"{network}.linear1"},
        f"{network}.linear1": {f"{network}.linear2"},
    }


@pytest.mark.parametrize("factory", [llama, gemma, bert, gpt2, t5, vit, whisper], ids=lambda f: f.__name__)
def test_folding_random_scales_changes_nothing(factory):
    model, inputs = made(factory)
    scaled = copied(model)
    generator = torch.Generator().manual_seed(3)
    pairs = find_pairs(scaled, inputs)[0]
    before = [p.clone() for p in scaled.parameters()]
    for pair in pairs:
        fold(pair, torch.exp(torch.randn(pair.size, generator=generator)))
    assert any(not torch.equal(a, b) for a, b in zip(before, scaled.parameters(), strict=True))
    assert change(model, scaled, inputs) < 1e-5


def test_finding_leaves_the_model_alone():
    model, inputs = llama()
    before, expected = {k: v.clone() for k, v in model.state_dict().items()}, outputs(model, inputs)
    model.train()
    find_pairs(model, inputs)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(map(torch.equal, outputs(model, inputs), expected))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, inputs = llama()
    pairs, _ = found(model.to(dtype), inputs)
    assert len(pairs) == 9


SCALING = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.LeakyReLU(0.1),
    nn.Identity(),
    lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    lambda x: x * torch.linspace(0.5, 2, x.shape[-1]),
    lambda x: x / 3,
    lambda x: x.flip(-1),
]


@pytest.mark.parametrize("f", SCALING)
def test_what_commutes_with_scales(f):
    pairs, _ = found(Block(f).eval(), torch.randn(12, 8))
    assert pairs["fc1"] == {"fc2"}
    assert pairs["norm"] == {"fc1"}


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (nn.GELU(), "gelu"),
        (nn.SiLU(), "silu"),
        (nn.ELU(), "elu"),
        (nn.Hardtanh(-1e3, 1e3), ""),
        (nn.ReLU6(), ""),
        (nn.Softmax(-1), "softmax"),
        (lambda x: x.relu().square(), "pow"),
        (lambda x: x + 1, "add"),
        (lambda x: x + torch.zeros(16), "added"),
        (lambda x: x - x.mean(-1, keepdim=True), "mean"),
        (lambda x: x @ (torch.eye(16) + 1), "mm"),
        (lambda x: x.clone().copy_(x) if x.sum() > 1e9 else x, "sum"),
        (lambda x: torch.zeros(len(x), 16).copy_(x), "written"),
        (lambda x: x.cumsum(-1), "cumsum"),
    ],
)
def test_what_does_not(f, reason):
    pairs, reasons = found(Block(f).eval(), torch.randn(12, 8))
    if isinstance(f, nn.Hardtanh) and f.max_val == 1e3:
        assert pairs["fc1"] == {"fc2"}  # never clamped: on this sample it is the identity
        return
    assert "fc1" not in pairs
    assert reason in reasons["fc1"]


class Residual(Block):
    def forward(self, x):
        x = self.norm(x)
        return x + self.fc2(self.fc1(x))


class Returned(Block):
    def forward(self, x):
        hidden = self.fc1(self.norm(x))
        return self.fc2(hidden), hidden


class OtherReader(Block):
    def __init__(self):
        super().__init__(nn.Identity())
        self.other = nn.Parameter(torch.randn(8, 3))

    def forward(self, x):
        x = self.norm(x)
        return self.fc2(self.fc1(x)).sum() + (x @ self.other).sum()


class ReadTwice(Block):
    def forward(self, x):
        return self.fc2(self.fc1(self.norm(x))) + self.fc2(F.relu(torch.cat([x, x], -1)))


class WeightElsewhere(Block):
    def forward(self, x):
        return self.fc2(self.fc1(self.norm(x))) + F.linear(torch.cat([x, x], -1), self.fc2.weight)


class Tied(Block):
    def __init__(self):
        super().__init__(nn.Identity())
        self.head = nn.Linear(16, 8)
        self.head.weight = self.fc2.weight

    def forward(self, x):
        return self.fc2(self.fc1(self.norm(x))) + self.head(torch.cat([x, x], -1))


@pytest.mark.parametrize(
    ("model", "source", "reason"),
    [
        (Residual(nn.Identity()), "norm", "added to another tensor"),
        (Returned(nn.Identity()), "fc1", "part of the model's"),
        (OtherReader(), "norm", "goes through mm"),
        (ReadTwice(nn.Identity()), "fc1", "fc2 also reads something else"),
        (WeightElsewhere(nn.Identity()), "fc1", "a weight of fc2 is used outside of it too"),
        (Tied(), "fc1", "a weight of fc2 is also head's"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_traps(model, source, reason):
    pairs, reasons = found(model.eval(), torch.randn(12, 8))
    assert source not in pairs
    assert reason in reasons[source]


class Gated(nn.Module):
    """Both factors go through what commutes with scales: one of them may take the scales, not both."""

    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return self.down(self.gate(x).relu() * self.up(x))


def test_two_sources_of_one_reader():
    pairs, reasons = found(Gated().eval(), torch.randn(12, 8))
    assert pairs == {"gate": {"down"}}
    assert reasons["up"] == "down has its scales from gate"


class Fused(nn.Module):
    """Gate and up in one layer, and what a test does with the two."""

    def __init__(self, f):
        super().__init__()
        self.both, self.down, self.f = nn.Linear(8, 32), nn.Linear(16, 8), f

    def forward(self, x):
        return self.down(self.f(*self.both(x).chunk(2, -1)))


@pytest.mark.parametrize(
    ("f", "channels"),
    [
        (lambda a, b: F.silu(a) * b, range(16, 32)),
        (lambda a, b: a * b.sigmoid(), range(16)),
        (lambda a, b: a + b, None),
        (lambda a, b: a * b, None),
        (lambda a, b: a * a, None),
        (lambda a, b: a * b.sigmoid() + b, None),
    ],
)
def test_parts_of_a_layer(f, channels):
    pairs, _ = find_pairs(Fused(f).eval(), torch.randn(12, 8))
    if channels is None:
        assert not pairs
        return
    (pair,) = pairs
    got = pair.consumers[0].channels
    assert got[got >= 0].tolist() == list(channels)


def test_a_shared_block_is_a_pair_only_if_all_its_calls_agree():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(nn.ReLU())

        def forward(self, x):
            return self.block(self.block(x))

    pairs, _ = found(Twice().eval(), torch.randn(12, 8))
    assert pairs == {"block.norm": {"block.fc1"}, "block.fc1": {"block.fc2"}}


def test_a_channel_without_inputs_keeps_its_scale():
    mask = torch.ones(16)
    mask[3] = 0
    model = Block(lambda x: x.relu() * mask).eval()
    pair = next(p for p in find_pairs(model, torch.randn(12, 8))[0] if p.name == "fc1")
    assert pair.consumers[0].channels.tolist() == [0, 1, 2, -1, *range(4, 16)]
    x, expected = torch.randn(5, 8), None
    expected = model(x)
    rows = model.fc1.weight[3].clone()
    fold(pair, torch.full((16,), 3.0))
    assert torch.equal(model.fc1.weight[3], rows)
    torch.testing.assert_close(model(x), expected)
