"""The demo's metrics against values worked out by hand; the sentence encoder against known hidden states."""

from __future__ import annotations

import math
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tcompress.demo import assets, sentence_encoder, tasks
from tcompress.demo.sentence_encoder import SentenceEncoder

# --- The tasks, with encoders that look the vector up ------------------------------------------------------


def angle(degrees: float) -> list[float]:
    return [math.cos(math.radians(degrees)), math.sin(math.radians(degrees))]


def table(vectors: dict[str, list[float]]) -> tasks.Encode:
    return lambda texts: torch.tensor([vectors[text] for text in texts])


WORDS = {"zero": angle(0), "ten": angle(10), "forty": angle(40), "ninety": angle(90)}
NESTED = [("zero", "ten", 9.0), ("zero", "forty", 5.0), ("zero", "ninety", 1.0)]


@pytest.fixture
def wordsim(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[tuple[str, str, float]]], None]:
    return lambda pairs: monkeypatch.setattr(assets, "wordsim353", lambda: pairs)


def test_wordsim_perfect_order_is_one(wordsim: Any) -> None:
    wordsim(NESTED)
    metric = tasks.wordsim353_spearman(table(WORDS))
    assert metric.value == pytest.approx(1.0)
    assert (metric.name, metric.n, metric.second) == ("WordSim353", 3, None)


def test_wordsim_reversed_order_is_minus_one(wordsim: Any) -> None:
    wordsim([(a, b, -score) for a, b, score in NESTED])
    assert tasks.wordsim353_spearman(table(WORDS)).value == pytest.approx(-1.0)


def test_wordsim_by_hand(wordsim: Any) -> None:
    # Cosines fall along the list, ranks 4 3 2 1; scores have ranks 3 4 2 1: rho = 1 - 6 * 2 / (4 * 15) = 0.8.
    wordsim([("zero", "ten", 7.0), ("ten", "forty", 9.0), ("zero", "forty", 5.0), ("zero", "ninety", 1.0)])
    assert tasks.wordsim353_spearman(table(WORDS)).value == pytest.approx(0.8)


def test_wordsim_takes_the_cosine_not_the_product(wordsim: Any) -> None:
    wordsim(NESTED)
    long = {word: [(1 + 50 * i) * x for x in vector] for i, (word, vector) in enumerate(WORDS.items())}
    assert tasks.wordsim353_spearman(table(long)).value == pytest.approx(1.0)


def test_wordsim_of_a_collapsed_model_raises(wordsim: Any) -> None:
    wordsim(NESTED)
    with pytest.raises(ValueError, match=r"^demo: wordsim353: embeddings: got the same cosine .*collapsed"):
        tasks.wordsim353_spearman(lambda texts: torch.ones(len(texts), 4))


# Two questions share p0, so there are three passages: the metric counts distinct ones.
BOOLQ = [("q0", "p0"), ("q1", "p0"), ("q2", "p1"), ("q3", "p2")]
PASSAGES = {"p0": angle(0), "p1": angle(60), "p2": angle(90)}
QUESTIONS = {
    "q0": angle(5),  # p0 first: rank 1
    "q1": angle(40),  # p1 (20 degrees), p0 (40), p2 (50): rank 2
    "q2": angle(62),  # p1 first: rank 1
    "q3": angle(-10),  # p0 (10), p1 (70), p2 (100): rank 3
}


@pytest.fixture
def boolq(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "boolq", lambda limit: BOOLQ[:limit])


def test_retrieval_by_hand(boolq: None) -> None:
    metric = tasks.boolq_retrieval(table(PASSAGES | QUESTIONS))
    assert (metric.name, metric.n, metric.value) == ("BoolQ retrieval R@1", 4, 2 / 4)
    assert metric.second is not None
    assert metric.second.name == "BoolQ retrieval MRR@10"
    assert metric.second.value == pytest.approx((1 + 1 / 2 + 1 + 1 / 3) / 4)
    assert "4 questions among 3 passages" in metric.description


def test_retrieval_limit_also_limits_the_passages(boolq: None) -> None:
    metric = tasks.boolq_retrieval(table(PASSAGES | QUESTIONS), limit=2)
    assert (metric.n, metric.value) == (2, 1.0)
    assert "2 questions among 1 passages" in metric.description


def test_mrr_is_cut_at_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    # Passages stand at 0, 1, 2 … degrees and every question below them all: gold passage i has rank i + 1.
    monkeypatch.setattr(assets, "boolq", lambda limit: [(f"q{i:02}", f"p{i:02}") for i in range(12)])
    vectors = {f"p{i:02}": angle(i) for i in range(12)} | {f"q{i:02}": angle(-5) for i in range(12)}
    metric = tasks.boolq_retrieval(table(vectors))
    assert metric.value == pytest.approx(1 / 12)
    assert metric.second is not None
    assert metric.second.value == pytest.approx(sum(1 / rank for rank in range(1, 11)) / 12)


def test_retrieval_of_a_collapsed_model_is_not_perfect(boolq: None) -> None:
    assert tasks.boolq_retrieval(lambda texts: torch.ones(len(texts), 4)).value == 0.0


def test_gold_ranks_counts_ties_against_gold() -> None:
    scores = torch.tensor([[0.5, 0.9, 0.1], [0.5, 0.5, 0.1], [0.5, 0.5, 0.5]])
    assert tasks.gold_ranks(scores, torch.tensor([1, 0, 2])).tolist() == [1, 2, 3]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("task", [tasks.wordsim353_spearman, tasks.boolq_retrieval])
def test_non_finite_embeddings_raise(task: Callable[..., Any], bad: float, wordsim: Any, boolq: None) -> None:
    wordsim(NESTED)

    def encode(texts: Sequence[str]) -> torch.Tensor:
        vectors = torch.ones(len(texts), 4)
        vectors[0, 2] = bad
        return vectors

    with pytest.raises(ValueError, match=r"^demo: \w+: embeddings: got NaN or inf in 1 of \d+ rows, expected finite"):
        task(encode)


@pytest.mark.parametrize("shape", [(5, 2, 2), (2, 5), (40,)])
def test_wrong_shape_raises(shape: tuple[int, ...], boolq: None) -> None:
    with pytest.raises(ValueError, match=r"^demo: boolq: embeddings: got shape \[.*\], expected \[3, D\];"):
        tasks.boolq_retrieval(lambda texts: torch.ones(shape))


def test_missing_scipy_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"^demo: scipy: .*; pip install tcompress\[demo\]"):
        tasks.wordsim353_spearman(table(WORDS))


# --- The sentence encoder, with a model whose hidden states are known --------------------------------------

VOCAB = 20
PAD = 7  # Not 0, and a letter's own id as well: the encoder must go by the mask.


def ids_of(text: str) -> list[int]:
    return [ord(letter) - ord("a") for letter in text]


class LetterTokenizer:
    """One token a letter."""

    pad_token_id = PAD

    def __call__(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [ids_of(text)[:max_length] for text in texts]}


class OneHotModel(torch.nn.Module):
    """The hidden state of token t is its one-hot vector, so a text's mean is its letter frequencies."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        assert input_ids.dtype == attention_mask.dtype == torch.int64
        assert torch.is_inference_mode_enabled()
        self.shapes.append(tuple(input_ids.shape))
        return SimpleNamespace(last_hidden_state=torch.nn.functional.one_hot(input_ids, VOCAB).float())


def frequencies(text: str) -> torch.Tensor:
    counts = torch.bincount(torch.tensor(ids_of(text)), minlength=VOCAB).double()
    return torch.nn.functional.normalize(counts, dim=0)


TEXTS = ["abcabcabc", "a", "hhhh", "qrstqrst", "bb", "hab", "dddddddddddd", "a"]


@pytest.fixture
def letters() -> SentenceEncoder:
    return SentenceEncoder(OneHotModel().eval(), LetterTokenizer())


@pytest.mark.parametrize("batch_tokens", [1, 7, 12, 24, 4096])
def test_rows_come_back_in_the_order_of_the_texts(letters: SentenceEncoder, batch_tokens: int) -> None:
    encode = SentenceEncoder(letters.model, letters.tokenizer, batch_tokens=batch_tokens)
    rows = encode(TEXTS)
    assert (rows.dtype, rows.shape, rows.device.type) == (torch.float32, (len(TEXTS), VOCAB), "cpu")
    torch.testing.assert_close(rows.double(), torch.stack([frequencies(text) for text in TEXTS]), atol=1e-6, rtol=0)


def test_batches_are_sorted_and_bounded(letters: SentenceEncoder) -> None:
    encode = SentenceEncoder(letters.model, letters.tokenizer, batch_tokens=9)
    encode(TEXTS)
    # Lengths 1 1 2 | 3 4 | 8 | 9 | 12: a fourth text would make 4 x 3 tokens; one over the bound goes alone.
    assert letters.model.shapes == [(3, 2), (2, 4), (1, 8), (1, 9), (1, 12)]


def test_long_texts_are_cut(letters: SentenceEncoder) -> None:
    encode = SentenceEncoder(letters.model, letters.tokenizer, max_length=3)
    torch.testing.assert_close(encode(["aaab"]).double(), frequencies("aaa")[None], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_precision_is_pooled_in_float32(letters: SentenceEncoder, dtype: torch.dtype) -> None:
    class Other(OneHotModel):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            hidden = super().forward(input_ids, attention_mask).last_hidden_state
            return SimpleNamespace(last_hidden_state=hidden.to(dtype))

    text = "a" * 100 + "b" * 3
    row = SentenceEncoder(Other().eval(), letters.tokenizer)([text])
    assert row.dtype == torch.float32
    torch.testing.assert_close(row.double(), frequencies(text)[None], atol=1e-6, rtol=0)


def test_encode_refuses_no_texts_and_training_mode(letters: SentenceEncoder) -> None:
    with pytest.raises(ValueError, match=r"^demo: encode: texts: got none"):
        letters([])
    letters.model.train()
    with pytest.raises(ValueError, match=r"^demo: encode: model: got training mode, expected eval"):
        letters(["a"])


def test_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"^demo: transformers: .*; pip install tcompress\[demo\]"):
        sentence_encoder.load_minilm()


def test_load_minilm_from_a_local_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A BERT of two small layers, written to a folder as the real one lies in the cache."""
    import tokenizers
    import transformers

    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "cat", "dog"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(tmp_path)
    config = transformers.BertConfig(
        vocab_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).bfloat16().save_pretrained(tmp_path)

    def no_network(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(assets, "minilm_dir", lambda: tmp_path)
    model, tokenizer = sentence_encoder.load_minilm()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}

    texts = ["dog cat cat dog dog", "cat", "dog cat", "bird"]
    rows = SentenceEncoder(model, tokenizer)(texts)
    alone = torch.cat([SentenceEncoder(model, tokenizer)([text]) for text in texts])
    assert rows.shape == (4, 8)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(4))
    torch.testing.assert_close(rows, alone, atol=1e-6, rtol=0)
