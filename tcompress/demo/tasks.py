"""The demo's two quality measures of a sentence encoder, each on labelled data.

WordSim-353 alone is a weak judge (pruning 30 % of MiniLM's weights raises it), retrieval alone says little
about fine shades of meaning; a compressed model has to hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from tcompress.demo import assets

Encode = Callable[[Sequence[str]], torch.Tensor]
"""n texts to [n, D] floats, a row a text; a row's length is of no account, as the tasks take the cosine."""

_MRR_CUT = 10


@dataclass(frozen=True)
class Metric:
    """One measured number: ``value`` over ``n`` items. Higher is better for every metric here.

    ``second`` is another number read off the same run, where there is one.
    """

    name: str
    value: float
    n: int
    unit: str
    description: str
    second: Metric | None = None


def wordsim353_spearman(encode: Encode) -> Metric:
    """Spearman's rank correlation of the embeddings' cosine with the human scores of WordSim-353 (353 pairs).

    Raises:
        ImportError: scipy is missing.
        ValueError: the embeddings have the wrong shape, are not finite, or give every pair the same cosine.
    """
    try:
        from scipy.stats import spearmanr
    except ImportError as err:
        raise ImportError(f"demo: scipy: got {err}, expected it; pip install tcompress[demo]") from err
    pairs = assets.wordsim353()
    words = sorted({word for first, second, _ in pairs for word in (first, second)})
    row = {word: i for i, word in enumerate(words)}
    vectors = _unit_rows(encode, words, "wordsim353")
    left = vectors[[row[first] for first, _, _ in pairs]]
    right = vectors[[row[second] for _, second, _ in pairs]]
    cosine = (left * right).sum(1)
    if bool((cosine == cosine[0]).all()):
        raise ValueError(
            "demo: wordsim353: embeddings: got the same cosine for every pair, expected a spread; "
            "the model has collapsed"
        )
    rho = float(spearmanr(cosine.numpy(), [score for _, _, score in pairs]).statistic)
    return Metric("WordSim353", rho, len(pairs), "Spearman rho", "cosine of two words against human similarity")


def boolq_retrieval(encode: Encode, limit: int | None = 300) -> Metric:
    """Find each question's passage, by cosine, among the distinct ones of BoolQ's first ``limit`` questions.

    The value is R@1, the share of questions whose passage comes first; ``second`` is MRR@10, the mean of
    1/rank with 0 beyond rank 10.

    Raises:
        ValueError: the embeddings have the wrong shape or are not finite.
    """
    pairs = assets.boolq(limit)
    passages = sorted({passage for _, passage in pairs})
    row = {passage: i for i, passage in enumerate(passages)}
    found = _unit_rows(encode, passages, "boolq")
    asked = _unit_rows(encode, [question for question, _ in pairs], "boolq")
    ranks = gold_ranks(asked @ found.T, torch.tensor([row[passage] for _, passage in pairs]))
    among = f"of {len(pairs)} questions among {len(passages)} passages"
    mrr = torch.where(ranks <= _MRR_CUT, 1 / ranks.double(), 0.0).mean().item()
    return Metric(
        "BoolQ retrieval R@1",
        (ranks == 1).double().mean().item(),
        len(pairs),
        "share",
        f"own passage ranked first, {among}",
        Metric("BoolQ retrieval MRR@10", mrr, len(pairs), "mean 1/rank", f"rank of the own passage, {among}"),
    )


def gold_ranks(scores: torch.Tensor, gold: torch.Tensor) -> torch.Tensor:
    """The rank, from 1, of column ``gold[i]`` in row i of ``scores`` [queries, candidates]; int64 [queries].

    A tie counts against the gold candidate. Otherwise a model that gives every text the same embedding, the
    very damage that this measures, would be perfect.
    """
    return (scores >= scores.gather(1, gold[:, None])).sum(1)


def _unit_rows(encode: Encode, texts: Sequence[str], task: str) -> torch.Tensor:
    """Embed, then normalise in float64: near ties are decided by the model and not by the last rounding."""
    vectors = encode(texts)
    if vectors.ndim != 2 or vectors.shape[0] != len(texts):
        raise ValueError(
            f"demo: {task}: embeddings: got shape {list(vectors.shape)}, expected [{len(texts)}, D]; one row a text"
        )
    # NaN compares false with everything, which would read as a rank like any other.
    bad = int((~vectors.isfinite()).any(1).sum())
    if bad:
        raise ValueError(
            f"demo: {task}: embeddings: got NaN or inf in {bad} of {len(texts)} rows, expected finite "
            "numbers; the model is broken, look at its last compression step"
        )
    return torch.nn.functional.normalize(vectors.detach().cpu().double(), dim=-1)
