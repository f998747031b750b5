"""Students made of transformers models: they run, say in their configuration what they are, and learn."""

import copy

import pytest
import torch
import transformers
from torch import nn

import tcompress
from tcompress.blocks import find_chains
from tcompress.calibrate import evaluating
from tcompress.distill.seen import see

IDS = torch.arange(1, 13).view(2, 6)
SIZES = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "vocab_size": 30,
    "initializer_range": 0.1,
}


def bert():
    config = transformers.BertConfig(num_hidden_layers=4, max_position_embeddings=16, **SIZES)
    return transformers.BertModel(config), {"input_ids": IDS}, "encoder.layer"


def llama():
    config = transformers.LlamaConfig(num_hidden_layers=4, num_key_value_heads=1, **SIZES)
    return transformers.LlamaForCausalLM(config), {"input_ids": IDS}, "model.layers"


def gpt2():
    config = transformers.GPT2Config(n_layer=4, n_embd=16, n_head=2, vocab_size=30, n_positions=16)
    return transformers.GPT2LMHeadModel(config), {"input_ids": IDS}, "transformer.h"


def t5():
    config = transformers.T5Config(num_layers=4, d_model=16, d_kv=8, d_ff=24, num_heads=2, vocab_size=30)
    return transformers.T5Model(config), {"input_ids": IDS, "decoder_input_ids": IDS}, "decoder.block"


@pytest.mark.parametrize("make", [bert, llama, gpt2, t5])
def test_every_second_layer(make, tmp_path):
    torch.manual_seed(0)
    teacher, batch, blocks = make()
    teacher.eval()
    before = copy.deepcopy(teacher.state_dict())
    student = tcompress.student_of(teacher, batch, every=2)
    chain = student.get_submodule(blocks)
    assert len(chain) == 2
    assert len(teacher.get_submodule(blocks)) == 4
    for new, old in ((0, 0), (1, 2)):
        for p, q in zip(chain[new].parameters(), teacher.get_submodule(blocks)[old].parameters(), strict=True):
            assert torch.equal(p, q)
            assert p is not q
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], student(**batch)[0])
    assert len(loaded.get_submodule(blocks)) == 2


def test_a_decoder_half_as_long_as_its_encoder(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_heads": 2, "vocab_size": 30}
    teacher = transformers.T5Model(transformers.T5Config(num_layers=4, num_decoder_layers=2, **sizes)).eval()
    batch = {"input_ids": IDS, "decoder_input_ids": IDS}
    student = tcompress.student_of(teacher, batch, every=2)
    assert (len(student.encoder.block), len(student.decoder.block)) == (2, 1)
    assert (student.config.num_layers, student.config.num_decoder_layers) == (2, 1)
    student.save_pretrained(tmp_path)
    loaded = transformers.T5Model.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch)[0], student(**batch)[0])


def test_a_decoder_without_some_layers_still_generates():
    teacher, _, _ = llama()
    student = tcompress.student_of(teacher.eval(), {"input_ids": IDS}, layers=[0, 3])
    cached = student.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=True)
    assert torch.equal(cached, student.generate(IDS[:1], max_new_tokens=4, do_sample=False, use_cache=False))


def test_torch_encoder():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    teacher = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    x = torch.randn(2, 5, 16)
    student = tcompress.student_of(teacher, x, layers=[0, 2])
    assert len(student.layers) == student.num_layers == 2
    assert student(x).shape == x.shape


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({}, "student_of: every, layers: got neither, expected one of the two"),
        ({"every": 2, "layers": [0]}, "got both, expected one of the two"),
        ({"every": 0}, "every: got 0, expected 1 or more"),
        ({"layers": [0, 4]}, r"layers: got \[0, 4\], expected some of 0 to 3, in rising order"),
        ({"layers": [1, 0]}, r"layers: got \[1, 0\], expected"),
        ({"layers": []}, r"layers: got \[\], expected"),
    ],
)
def test_what_cannot_be_made(settings, match):
    teacher, batch, _ = bert()
    with pytest.raises(ValueError, match=match):
        tcompress.student_of(teacher, batch, **settings)
    with pytest.raises(ValueError, match="student_of: teacher: got no sequence of blocks"):
        tcompress.student_of(nn.Linear(3, 3), torch.ones(1, 3), every=2)


def test_layers_that_do_not_run_alone():
    class Widening(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    assert tcompress.student_of(Widening(), torch.ones(1, 4), every=2)(torch.ones(1, 4)).shape == (1, 8)
    with pytest.raises(ValueError, match=r"student_of: layers: got \[1, 2\], without the others the model fails"):
        tcompress.student_of(Widening(), torch.ones(1, 4), layers=[1, 2])


def test_narrower():
    torch.manual_seed(0)
    teacher, batch, _ = bert()
    student = tcompress.narrower(teacher, hidden_size=8, intermediate_size=12, num_hidden_layers=2)
    assert student.config.hidden_size == 8
    assert teacher.config.hidden_size == 16
    weight = student.encoder.layer[1].intermediate.dense.weight
    assert torch.equal(weight, teacher.encoder.layer[1].intermediate.dense.weight[:12, :8])
    assert student(**batch)[0].shape == (2, 6, 8)
    other = tcompress.narrower(teacher, copy_weights=False, hidden_size=8)
    assert not torch.equal(other.embeddings.word_embeddings.weight, student.embeddings.word_embeddings.weight)
    with pytest.raises(ValueError, match="narrower: changes: got width, expected a field of BertConfig"):
        tcompress.narrower(teacher, width=8)
    with pytest.raises(ValueError, match="narrower: teacher: got Linear, expected a transformers model"):
        tcompress.narrower(nn.Linear(2, 2))


@pytest.mark.parametrize("make", [bert, llama, gpt2, t5])
def test_attention_is_seen_in_any_architecture(make):
    """Softmax of the scores that were taken down, times the values, is what the model computed."""
    torch.manual_seed(0)
    model, batch, _ = make()
    model.eval()
    padded = torch.ones_like(IDS)
    padded[0, 4:] = 0
    batch = batch | {"attention_mask": padded}
    outputs = []
    real = nn.functional.scaled_dot_product_attention

    def spy(*args, **kwargs):
        outputs.append(real(*args, **kwargs))
        return outputs[-1]

    with evaluating(model), pytest.MonkeyPatch.context() as patch:
        chains = find_chains(model, batch)
        patch.setattr(nn.functional, "scaled_dot_product_attention", spy)
        seen = see(model, batch, chains)
        patch.undo()
        expected, outputs = outputs, []
        seen = see(model, batch, chains, attention=True)
    calls = [call for chain in seen.attention for block in chain for call in block]
    assert len(calls) == len(expected) == (12 if make is t5 else 4)
    for call, out in zip(calls, expected, strict=True):
        scores = call.scores if call.allowed is None else call.scores.masked_fill(~call.allowed, -torch.inf)
        assert torch.allclose(scores.softmax(-1) @ call.value, out, atol=1e-5)
    assert torch.equal(seen.tokens, padded.bool())
    assert [h.shape for h in seen.hidden[0]] == [(2, 6, 16)] * 4


@pytest.mark.parametrize("make", [bert, llama, t5])
def test_students_learn(make):
    pytest.importorskip("accelerate", reason="the engine of training: pip install tcompress[train]")
    torch.manual_seed(0)
    teacher, batch, _ = make()
    teacher.eval()
    student = tcompress.student_of(teacher, batch, every=2)
    losses = ["hidden", "attention", "relations"]
    result = tcompress.distill(student, teacher, [batch], losses=losses, steps=15, lr=3e-3)
    first, last = (result.history.losses[i]["total"] for i in (0, -1))
    assert last < 0.8 * first


def test_blocks_that_share_their_weights_are_seen_at_each_place():
    torch.manual_seed(0)
    teacher, batch, blocks = bert()
    student = copy.deepcopy(teacher.eval())
    layers = student.get_submodule(blocks)
    layers[1], layers[3] = layers[0], layers[2]
    with evaluating(student):
        chains = find_chains(student, batch)
        seen = see(student, batch, chains, attention=True)
    assert [len(block) for block in seen.attention[0]] == [1] * 4
    assert len({id(h) for h in seen.hidden[0]}) == 4
    pytest.importorskip("accelerate", reason="the engine of training: pip install tcompress[train]")
    result = tcompress.distill(student, teacher, [batch], losses=["hidden", "attention"], steps=8, lr=1e-3)
    assert result.history.losses[-1]["total"] < 0.9 * result.history.losses[0]["total"]
    assert student.get_submodule(blocks)[1] is student.get_submodule(blocks)[0]


def test_eager_attention_is_named():
    teacher, batch, _ = bert()
    teacher.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="got 0 calls in a block of the student and 0 .* attn_implementation='sdpa'"):
        tcompress.distill(copy.deepcopy(teacher), teacher, [batch], losses=["attention"])
