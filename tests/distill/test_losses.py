"""Each loss against the paper's formula, written down plainly in numpy."""

import math

import numpy as np
import pytest
import torch

from tcompress.distill.attention_maps import attention_mse
from tcompress.distill.cosine import cosine_distance
from tcompress.distill.hidden import hidden_mse
from tcompress.distill.labels import LabelsTerm
from tcompress.distill.logits import soft_cross_entropy
from tcompress.distill.loss import layer_pairs
from tcompress.distill.relations import relation_kl
from tcompress.distill.seen import AttentionCall, Seen
from tcompress.recipe.losses import LabelsLoss

B, T, D, H = 2, 5, 8, 2
TOKENS = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def softmax(x):
    e = [math.exp(v - max(x)) for v in x]
    return [v / sum(e) for v in e]


def kept_rows(x, tokens):
    return [x[b, t].double().numpy() for b in range(B) for t in range(T) if tokens is None or tokens[b, t]]


def call(seed, heads=H, width=D, allowed=None, bias=None):
    q, k, v = (randn(B, heads, T, width // heads, seed=seed + i) for i in range(3))
    return AttentionCall(q, k, v, allowed, bias, 1 / math.sqrt(width // heads))


@pytest.mark.parametrize("tokens", [None, TOKENS])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logits(tokens, temperature):
    student, teacher = randn(B, T, 7), 3 * randn(B, T, 7, seed=1)
    rows = []
    for s, t in zip(kept_rows(student, tokens), kept_rows(teacher, tokens), strict=True):
        p, q = softmax(list(t / temperature)), softmax(list(s / temperature))
        rows.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    expected = temperature**2 * sum(rows) / len(rows)
    assert float(soft_cross_entropy(student, teacher, temperature, tokens)) == pytest.approx(expected, rel=1e-5)
    assert float(soft_cross_entropy(teacher, teacher, temperature, tokens)) == pytest.approx(0, abs=1e-6)


def test_gradients_do_not_vanish_with_temperature():
    """Hinton's reason for T²: at a high temperature the gradient tends to that of half the squared difference / C."""
    student, teacher = randn(3, 7).requires_grad_(), randn(3, 7, seed=1)
    soft_cross_entropy(student, teacher, 1000.0).backward()
    centred = [(x - x.mean(-1, keepdim=True)).detach() for x in (student, teacher)]
    assert torch.allclose(student.grad, (centred[0] - centred[1]) / 7 / 3, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_hidden(tokens):
    student, teacher = randn(B, T, D), randn(B, T, D, seed=1)
    pairs = list(zip(kept_rows(student, tokens), kept_rows(teacher, tokens), strict=True))
    expected = np.mean([((s - t) ** 2).mean() for s, t in pairs])
    assert float(hidden_mse(student, teacher, tokens)) == pytest.approx(expected, rel=1e-5)
    size = np.mean([(t**2).mean() for _, t in pairs])
    assert float(hidden_mse(student, teacher, tokens, relative=True)) == pytest.approx(expected / size, rel=1e-5)


@pytest.mark.parametrize("tokens", [None, TOKENS])
@pytest.mark.parametrize("pooled", [False, True])
def test_cosine(tokens, pooled):
    student, teacher = randn(B, T, D), randn(B, T, D, seed=1)
    if pooled:
        kept = [[t for t in range(T) if tokens is None or tokens[b, t]] for b in range(B)]
        means = [[x[b, kept[b]].double().mean(0).numpy() for b in range(B)] for x in (student, teacher)]
        pairs = list(zip(*means, strict=True))
    else:
        pairs = list(zip(kept_rows(student, tokens), kept_rows(teacher, tokens), strict=True))
    expected = np.mean([1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t) for s, t in pairs])
    assert float(cosine_distance(student, teacher, tokens, pooled)) == pytest.approx(expected, rel=1e-5)


def test_cosine_of_embeddings_without_tokens():
    student, teacher = randn(B, D), randn(B, D, seed=1)
    own, its = student.double().numpy(), teacher.double().numpy()
    expected = np.mean([1 - s @ t / np.linalg.norm(s) / np.linalg.norm(t) for s, t in zip(own, its, strict=True)])
    assert float(cosine_distance(student, teacher, TOKENS, True)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("tokens", [None, TOKENS])
def test_attention_maps(tokens):
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    bias = randn(1, H, T, T, seed=9)
    student, teacher = call(0, allowed=causal), call(10, allowed=causal, bias=bias)
    errors = []
    for b in range(B):
        for h in range(H):
            for i in range(T):
                for j in range(i + 1):
                    if tokens is None or (tokens[b, i] and tokens[b, j]):
                        s = float(student.query[b, h, i] @ student.key[b, h, j]) / math.sqrt(D / H)
                        t = float(teacher.query[b, h, i] @ teacher.key[b, h, j]) / math.sqrt(D / H)
                        errors.append((s - t - float(bias[0, h, i, j])) ** 2)
    assert float(attention_mse(student, teacher, tokens)) == pytest.approx(np.mean(errors), rel=1e-5)


@pytest.mark.parametrize("tokens", [None, TOKENS])
@pytest.mark.parametrize("kind", ["qq", "kk", "vv", "qk"])
def test_relations(kind, tokens):
    """Of a student with other heads and another width; both are split into 4 relation heads."""
    student, teacher, heads = call(0, heads=2, width=8), call(10, heads=3, width=12), 4
    names = {"q": "query", "k": "key", "v": "value"}
    total = []

    def relation(one, b, r, i):
        first, second = (getattr(one, names[c])[b].double().permute(1, 0, 2).reshape(T, -1).numpy() for c in kind)
        width = first.shape[1] // heads
        part = slice(r * width, (r + 1) * width)
        keys = [j for j in range(T) if tokens is None or tokens[b, j]]
        return softmax([first[i, part] @ second[j, part] / math.sqrt(width) for j in keys])

    for b in range(B):
        for r in range(heads):
            for i in range(T):
                if tokens is None or tokens[b, i]:
                    p, q = relation(teacher, b, r, i), relation(student, b, r, i)
                    total.append(sum(x * math.log(x / y) for x, y in zip(p, q, strict=True)))
    assert float(relation_kl(student, teacher, kind, heads, tokens)) == pytest.approx(np.mean(total), rel=1e-4)
    assert float(relation_kl(teacher, teacher, kind, heads, tokens)) == pytest.approx(0, abs=1e-6)


def test_labels():
    logits = randn(2, 3, 4)
    labels = torch.tensor([[0, -100, 3], [1, 2, -100]])
    seen = Seen(logits, None)

    def nll(b, t, label):
        return -math.log(softmax(logits[b, t].tolist())[label])

    plain = [nll(0, 0, 0), nll(0, 2, 3), nll(1, 0, 1), nll(1, 1, 2)]
    assert float(LabelsTerm(LabelsLoss())(seen, seen, {"labels": labels}, None)) == pytest.approx(
        np.mean(plain), rel=1e-5
    )
    shifted = [nll(0, 1, 3), nll(1, 0, 2)]
    term = LabelsTerm(LabelsLoss(causal=True))
    assert float(term(seen, seen, {"labels": labels}, None)) == pytest.approx(np.mean(shifted), rel=1e-5)
    with pytest.raises(ValueError, match="distill: labels: got a batch .* without them, expected a mapping"):
        term(seen, seen, logits, None)
    with pytest.raises(ValueError, match=r"distill: labels: got \[2\], expected \[2, 3\]"):
        term(seen, seen, {"labels": labels[:, 0]}, None)


def test_layers_are_mapped_uniformly():
    assert list(layer_pairs([[0, 1]], [list("abcdef")], "x")) == [(0, "c"), (1, "f")]
    assert list(layer_pairs([[0, 1, 2]], [list("abcd")], "x")) == [(0, "a"), (1, "b"), (2, "d")]
    assert list(layer_pairs([[0], [1]], [list("ab"), list("cd")], "x")) == [(0, "b"), (1, "d")]
    with pytest.raises(ValueError, match="x: blocks: got 3 of the student, expected at most the teacher's 2"):
        list(layer_pairs([[0, 1, 2]], [list("ab")], "x"))
    with pytest.raises(ValueError, match="x: blocks: got 0 sequences of blocks in the student and 1 in the teacher"):
        list(layer_pairs([], [list("ab")], "x"))
