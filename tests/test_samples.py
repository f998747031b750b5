from __future__ import annotations

import pytest
import torch
from torch import nn

import tcompress
from tcompress.errors import CompressionWarning
from tcompress.samples import Samples


class Model(nn.Module):
    def __init__(self, positions=None):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 8), nn.Linear(8, 50)
        if positions is not None:
            self.config = type("Config", (), {"max_position_embeddings": positions})()

    def forward(self, input_ids, attention_mask=None):
        return self.head(self.embedding(input_ids))


class Tokenizer:
    """As those of transformers: a letter a token, and a key that `Model` does not take."""

    def __call__(self, text, return_tensors, verbose):
        assert (return_tensors, verbose) == ("pt", False)
        ids = torch.tensor([[ord(letter) % 50 for letter in text]], dtype=torch.long)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def read(data, model=None, **options):
    samples = Samples(data, model or Model(), **options)
    return list(samples), samples.notes


@pytest.mark.parametrize("data", ["some text", ["some text"], [["some text"]], [("some text",)]])
def test_text(data):
    (sample,), notes = read(data, tokenizer=Tokenizer())
    assert set(sample) == {"input_ids", "attention_mask"}
    assert sample["input_ids"].shape == (1, 9)
    assert notes == []


def test_a_batch_of_text_is_a_sample_each():
    found, _ = read([["one", "three"], "five5"], tokenizer=Tokenizer())
    assert [s["input_ids"].shape[1] for s in found] == [3, 5, 5]


def test_empty_text_is_left_out():
    found, notes = read(["one", "", "two"], tokenizer=Tokenizer())
    assert len(found) == 2
    assert notes == ["1 of 3 calibration samples left out: empty, or with NaN or infinity"]


def test_text_without_a_tokenizer():
    with pytest.raises(TypeError, match="compress: data: got text, expected tensors, or text and tokenizer="):
        read(["text"])
    with pytest.raises(TypeError, match="compress: tokenizer: got int, expected a callable; "):
        Samples(["text"], Model(), tokenizer=3)


def test_too_long_is_clipped():
    mask = torch.zeros(2, 1, 9, 9)
    batch = {"input_ids": torch.arange(18).view(2, 9), "attention_mask": torch.ones(2, 9), "other": mask}
    (kept, clipped), notes = read([torch.arange(8).view(2, 4), batch], Model(positions=6))
    assert kept.shape == (2, 4)
    assert torch.equal(clipped["input_ids"], batch["input_ids"][:, :6])
    assert clipped["attention_mask"].shape == (2, 6)
    assert clipped["other"] is mask
    assert notes == ["1 of 2 calibration samples clipped to 6 tokens"]


def test_max_length_goes_before_the_positions():
    (sample,), _ = read("a long text", Model(positions=6), tokenizer=Tokenizer(), max_length=4)
    assert sample["input_ids"].shape == (1, 4)
    with pytest.raises(ValueError, match="compress: max_length: got 0, expected at least 1"):
        read("text", max_length=0)


def test_max_length_beyond_the_positions():
    (sample,), notes = read(torch.zeros(1, 9, dtype=torch.long), Model(positions=6), max_length=8)
    assert sample.shape == (1, 6)
    assert notes == ["1 of 1 calibration samples clipped to 6 tokens"]


@pytest.mark.parametrize(("length", "expected"), [(4, 4), (int(1e30), 6), (None, 6)])
def test_the_length_that_the_tokenizer_knows(length, expected):
    tokenizer = Tokenizer()
    tokenizer.model_max_length = length
    (sample,), _ = read("a long text", Model(positions=6), tokenizer=tokenizer)
    assert sample["input_ids"].shape == (1, expected)
    (sample,), _ = read("a long text", Model(positions=6), tokenizer=tokenizer, max_length=5)
    assert sample["input_ids"].shape == (1, 5)


def test_an_encoder_and_a_decoder_are_clipped_by_their_own_lengths():
    shapes = {"input_ids": 30, "attention_mask": 30, "decoder_input_ids": 20, "labels": 9}
    batch = {name: torch.ones(2, n, dtype=torch.long) for name, n in shapes.items()}
    batch["decoder_attention_mask"] = torch.ones(2, 20)
    (sample,), notes = read(batch, Model(positions=16))
    assert {name: t.shape[1] for name, t in sample.items()} == {
        "input_ids": 16,
        "attention_mask": 16,
        "decoder_input_ids": 16,
        "decoder_attention_mask": 16,
        "labels": 9,
    }
    assert notes == ["1 of 1 calibration samples clipped to 16 tokens"]


def test_roberta_has_fewer_positions_than_its_table():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.RobertaConfig(vocab_size=50, max_position_embeddings=34, **sizes)
    model = transformers.RobertaModel(config).eval()
    (sample,), notes = read({"input_ids": torch.full((1, 40), 5)}, model)
    assert notes == ["1 of 1 calibration samples clipped to 32 tokens"]
    assert model(**sample).last_hidden_state.shape == (1, 32, 16)
    # BERT pads too, but its positions begin at 0, also where there are as many as words.
    config = transformers.BertConfig(vocab_size=34, max_position_embeddings=34, **sizes)
    (sample,), _ = read({"input_ids": torch.full((1, 40), 5)}, transformers.BertModel(config))
    assert sample["input_ids"].shape == (1, 34)


def test_floats_are_not_clipped():
    x = torch.randn(2, 9)
    (sample,), notes = read(x, Model(positions=6))
    assert sample is x
    assert notes == []


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(bad):
    good, spoiled = torch.ones(2, 3), torch.full((2, 3), bad)
    found, notes = read([good, spoiled, (good, [spoiled]), {"x": spoiled}])
    assert len(found) == 1
    assert notes == ["3 of 4 calibration samples left out: empty, or with NaN or infinity"]


def test_a_mask_may_hold_minus_infinity():
    mask = torch.tensor([[0.0, -torch.inf]])
    assert len(read({"x": torch.ones(1), "attention_mask": mask})[0]) == 1
    for bad in (torch.nan, torch.inf):
        with pytest.raises(ValueError, match="1 samples that are empty or hold NaN or infinity"):
            read({"x": torch.ones(1), "attention_mask": mask.clone().fill_(bad)})


def test_a_positional_mask_may_hold_minus_infinity():
    x, mask = torch.zeros(1, 8, dtype=torch.long), nn.Transformer.generate_square_subsequent_mask(8)
    assert len(read((x, mask))[0]) == 1
    assert len(read((x, {"anything": mask}))[0]) == 1  # zeros and minus infinity: what else
    assert len(read((x, mask + 1))[0]) == 1  # by the name in `forward`: attention_mask
    for bad in ((mask + 1, x), (x, mask.clone().fill_diagonal_(torch.nan)), (x, x, mask + 1)):
        with pytest.raises(ValueError, match="1 samples that are empty or hold NaN or infinity"):
            read(bad)


def test_nothing_to_use():
    with pytest.raises(ValueError, match="compress: data: got no batches, expected at least one"):
        read([])
    with pytest.raises(ValueError, match="compress: data: got 2 samples that are empty or hold NaN or infinity"):
        read([torch.full((1,), torch.nan), torch.zeros(0, 3)])


def test_a_reading_is_counted_anew():
    samples = Samples([torch.ones(1), torch.zeros(0)], Model())
    for _ in range(2):
        list(samples)
    assert samples.notes == ["1 of 2 calibration samples left out: empty, or with NaN or infinity"]


def test_compress_reads_text_and_warns():
    with pytest.warns(CompressionWarning, match="2 of 3 calibration samples clipped to 5 tokens"):
        result = tcompress.compress(
            Model(positions=5),
            {"steps": [{"step": "quantize", "scheme": "W8A8"}]},
            ["a text", "text", "some text"],
            tokenizer=Tokenizer(),
        )
    assert result.report.output_cosine > 0.99


def test_a_sample_that_a_mask_hides_is_left_out():
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 4, dtype=torch.long)}
    hidden = {**batch, "attention_mask": torch.zeros(1, 4, dtype=torch.bool)}
    found, notes = read([batch, hidden])
    assert len(found) == 1
    assert notes == ["1 of 2 calibration samples left out: their attention mask leaves no token"]
    with pytest.raises(ValueError, match="got 1 samples that are empty or hold NaN or infinity, or are padding alone"):
        read([tuple(hidden.values())])
    added = torch.zeros(1, 4)  # to scores: hides nothing
    assert len(read([{**batch, "attention_mask": added}])[0]) == 1


@pytest.mark.parametrize("name", ["attention_mask", "src_key_padding_mask"])
def test_masks_that_do_not_say_which_tokens_count(name):
    batch = {"input_ids": torch.ones(1, 4, dtype=torch.long), name: torch.ones(1, 1, 4, 4)}
    _, notes = read([batch, {"input_ids": batch["input_ids"]}])
    assert notes == [
        "1 of 2 calibration samples with a mask that is not [B, S] of ones and zeros, or of zeros and -inf, "
        "named attention_mask: all their tokens count"
    ]
    assert read({"input_ids": batch["input_ids"], "mask": torch.ones(4, 4)})[1] == []


def test_padding_without_a_mask():
    model = Model(positions=9)
    model.config.pad_token_id = 0
    rows = {"right": [5, 6, 0, 0], "left": [0, 0, 5, 6], "end": [5, 6, 7, 0], "none": [5, 0, 0, 6]}
    ids = {name: torch.tensor([[1, 2, 3, 4], row]) for name, row in rows.items()}
    for name, tokens in ids.items():
        _, notes = read([tokens, {"input_ids": tokens}], model)
        padded = "2 of 2 calibration samples with padding and no attention_mask: all their tokens count"
        assert notes == ([padded] if name in ("left", "right") else []), name
    assert read({"input_ids": ids["right"], "attention_mask": (ids["right"] != 0).long()}, model)[1] == []
