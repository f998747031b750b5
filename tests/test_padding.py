"""Padding counts in nothing: a padded batch gives what its texts give one by one."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tcompress
from tcompress import calibrate, padding
from tcompress.attention_error import AttentionError
from tcompress.distances import PIECE
from tcompress.errors import CompressionWarning
from tcompress.statistics import InputStatistics

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).parent / "integrations"))
from tiny_models import bert, ids, llama, made, t5

LENGTHS = (12, 5, 8)
GPTQ = {"scheme": "W4A16-g32", "algorithm": "gptq"}


def padded(lengths=LENGTHS):
    tokens, mask = ids(len(lengths)), torch.zeros(len(lengths), 12, dtype=torch.long)
    for i, length in enumerate(lengths):
        mask[i, :length] = 1
        tokens[i, length:] = 0
    return {"input_ids": tokens, "attention_mask": mask}


def one_by_one(batch):
    lengths = batch["attention_mask"].sum(1).tolist()
    return [{"input_ids": row[None, :n]} for row, n in zip(batch["input_ids"], lengths, strict=True)]


def statistics(model, samples):
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in name}
    found = {name: InputStatistics(m.weight.shape[1]) for name, m in layers.items()}
    handles = [m.register_forward_pre_hook(found[name].hook, with_kwargs=True) for name, m in layers.items()]
    with calibrate.evaluating(model):
        for sample in samples:
            calibrate.run(model, sample)
    for handle in handles:
        handle.remove()
    return found


def apart(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("factory", [bert, llama])
def test_hessians_are_those_of_the_texts_alone(factory):
    model, batch = made(factory), padded()
    got, expected = statistics(model, [batch]), statistics(model, one_by_one(batch))
    everything = statistics(model, [{"input_ids": batch["input_ids"]}])
    for name, found in got.items():
        its = expected[name]
        assert (found.count, found.padding) == (its.count, 11) == (25, 11)
        for of in ("hessian", "norm", "mean", "mean_abs", "mean_square", "max_abs"):
            assert apart(getattr(found, of), getattr(its, of)) < 1e-5, (name, of)
        assert apart(everything[name].hessian, its.hessian) > 0.01, name  # which padding would be seen in


def test_an_encoder_and_a_decoder_have_their_own():
    model, batch = made(t5), padded()
    decoder = padded((3, 9, 7))
    batch |= {
        "decoder_input_ids": decoder["input_ids"][:, :9],
        "decoder_attention_mask": decoder["attention_mask"][:, :9],
    }
    found = statistics(model, [batch])
    for name, its in found.items():
        of_encoder = name.startswith("encoder") or "EncDecAttention.k" in name or "EncDecAttention.v" in name
        assert its.count == (25 if of_encoder else 19), name


def test_masks_of_one_shape_leave_what_either_leaves():
    model, batch = made(t5), padded((12, 5))
    batch |= {"decoder_input_ids": ids(2)}
    assert padding.token_masks(model, batch) == ()  # the decoder's tokens, which are as long, all count
    assert padding.token_masks(model, {**batch, "decoder_input_ids": ids(2)[:, :7]})[0].sum() == 17
    batch["decoder_attention_mask"] = padded((3, 9))["attention_mask"]
    (mask,) = padding.token_masks(model, batch)
    assert mask.sum(1).tolist() == [12, 9]
    del batch["decoder_input_ids"], batch["decoder_attention_mask"]
    assert padding.token_masks(model, {**batch, "labels": ids(2)}) == ()
    assert padding.token_masks(made(llama), {**batch, "labels": ids(2)})[0].sum() == 17


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (torch.tensor([[1, 1, 0]]), [True, True, False]),
        (torch.tensor([[True, False, True]]), [True, False, True]),
        (torch.tensor([[1.0, 1.0, 0.0]]), [True, True, False]),
        (torch.zeros(1, 3), None),  # of either kind
        # Added to scores.
        (torch.tensor([[0.0, -torch.inf, 0.0]]), [True, False, True]),
        (torch.tensor([[0.0, torch.finfo().min, 0.0]]), [True, False, True]),
        (torch.tensor([[-1e4, 0.0, 0.0]], dtype=torch.half), [False, True, True]),
        (torch.full((1, 3), -torch.inf), [False, False, False]),
        (torch.tensor([[0.0, -1.0, -2.0]]), None),
        (torch.tensor([[1.0, 0.0, -torch.inf]]), None),
        (torch.tensor([[0.0, torch.nan, 0.0]]), None),
        (torch.empty(0, 3), None),
        (torch.ones(1, 1, 3, 3), None),
        (None, None),
    ],
)
def test_kinds_of_masks(mask, expected):
    found = padding.as_mask(mask)
    assert (found is None) if expected is None else (found[0].tolist() == expected)


def test_positional_arguments_have_the_names_of_the_forward():
    class Model(nn.Module):
        def forward(self, input_ids, attention_mask=None): ...

    mask = torch.tensor([[1, 0]])
    for kind in (mask, mask.bool(), mask.float(), (1 - mask) * torch.finfo().min):
        for batch in ((ids(1, 2), kind), [ids(1, 2), kind], {"input_ids": ids(1, 2), "attention_mask": kind}):
            (found,) = padding.token_masks(Model(), batch)
            assert torch.equal(found, mask.bool())
    assert padding.token_masks(Model(), (ids(1, 2), torch.zeros(1, 2))) == ()
    assert padding.token_masks(Model(), (mask, ids(1, 2))) == ()
    assert padding.token_masks(Model(), mask) == ()


def test_which_tensors_are_of_tokens():
    mask = torch.tensor([[True, False, True], [True, True, False]])
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(padding.counted(x, (mask,)), x[mask])
    assert torch.equal(padding.counted(x.view(6, 4), (mask,)), x[mask])
    assert torch.equal(padding.counted(x.view(2, 3, 2, 2), (mask,)), x[mask].view(4, 2, 2))
    for other in (x[:, :2], x[:, 0], x.flatten(), x.view(3, 2, 4)):
        assert padding.counted(other, (mask,)) is other
    assert padding.counted(x) is x  # no batch is running


def compressed(model, steps, data):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        return tcompress.compress(model, {"steps": steps}, data, progress=False)


STEPS = {
    "gptq": [GPTQ],
    "autoround": [{**GPTQ, "algorithm": "autoround", "iterations": 4}],
    "smooth": [{"step": "smooth"}, {"scheme": "W8A8"}],
    "awq": [{"step": "awq"}, {"scheme": "W4A16-g32"}],
    "attention": [{"attention": "int8"}],
}


@pytest.mark.parametrize("name", STEPS)
def test_a_mask_of_ones_changes_nothing(name):
    tokens = ids(3)
    with_mask = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    one, other = (compressed(made(llama), STEPS[name], data) for data in ({"input_ids": tokens}, with_mask))
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[key]), key
    assert one.report == other.report


@pytest.mark.parametrize("name", [name for name in STEPS if name != "attention"])  # whose keys' scales padding is in
def test_the_report_is_that_of_the_texts_alone(name):
    """What padding holds moves nothing: not what algorithms decide, nor what the report says of it."""
    batch = padded()
    tokens = batch["input_ids"].where(batch["attention_mask"] == 1, 7)
    first, second = (compressed(made(llama), STEPS[name], b) for b in (batch, {**batch, "input_ids": tokens}))
    for key, value in first.model.state_dict().items():
        torch.testing.assert_close(value, second.model.state_dict()[key], rtol=1e-5, atol=1e-5)
    assert first.report.output_cosine == pytest.approx(second.report.output_cosine, abs=1e-6)
    for one, other in zip(first.report.layers, second.report.layers, strict=True):
        assert one.output_sqnr_db == pytest.approx(other.output_sqnr_db, abs=1e-3)


def test_distances_of_layers_add_up():
    """The report's error of a padded batch is that of its texts."""
    model, batch = made(bert), padded()
    recipe = [{"scheme": "W8A8", "ignore": ["*pooler*"]}]
    whole, parts = (compressed(model, recipe, data).report for data in (batch, one_by_one(batch)))
    for one, other in zip(whole.compressed, parts.compressed, strict=True):
        assert one.output_sqnr_db == pytest.approx(other.output_sqnr_db, abs=0.01), one.name


def test_the_first_outputs_padding_is_not_compared():
    masks = (torch.tensor([[True, False], [True, True]]),)
    output = torch.randn(2, 2, 3)
    reference = calibrate.Reference.of(None, output, masks)
    changed = output.clone()
    changed[0, 1] = torch.nan
    assert reference.rows.shape == (3, 3)
    assert reference.cosine_to(changed) == pytest.approx(1)
    assert reference.is_finite(changed)
    assert calibrate.Reference.of(None, changed, masks).finite
    assert not calibrate.Reference.of(None, changed).finite


def test_of_a_large_output_rows_of_text_are_kept():
    mask = torch.arange(600)[None] % 3 > 0
    output = torch.where(mask[..., None], 1.0, torch.nan).repeat(1, 1, 2 * PIECE // 600)
    kept = calibrate.Reference.of(None, output, (mask,))
    assert kept.finite
    assert 100 < len(kept.rows) <= 400
    assert torch.isfinite(kept.rows).all()


def test_outputs_that_are_compared_are_without_padding():
    model, batch = made(llama), padded()
    assert calibrate.output_tokens(model, batch).shape == (25, 96)
    assert calibrate.output_tokens(model, {"input_ids": batch["input_ids"]}).shape == (3, 12, 96)


def test_attention_leaves_out_padded_queries():
    expected, got = torch.randn(2, 2, 4, 3, 8)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    error, alone = AttentionError(8), AttentionError(8)
    with padding.counting((mask,)):
        error.add(expected, got)
    for b, length in enumerate((2, 1)):
        alone.add(expected[b : b + 1, :, :length], got[b : b + 1, :, :length])
    assert error.total == pytest.approx(alone.total)
    assert error.heads == [pytest.approx(head) for head in alone.heads]
