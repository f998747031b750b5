from __future__ import annotations

import copy
import dataclasses
import sys

import pytest
import torch
from torch import nn

import tcompress
from tcompress.advisor import Target
from tcompress.advisor.candidates import candidates, with_sensitive_layers_in_8_bits
from tcompress.advisor.profile import kernel_seconds, profile
from tcompress.quantize.scheme import SCHEMES


def model(zeros=0.0):
    torch.manual_seed(0)
    found = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    for layer in found[::2]:
        layer.weight.data.view(-1)[: int(layer.weight.numel() * zeros)] = 0
    return found


def data(n=4):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, 64, generator=generator) for _ in range(n)]


def advise(*args, **options):
    return tcompress.advise(*args, seconds=0.02, progress=False, **options)


def test_the_answer_is_measured():
    original = model()
    before = copy.deepcopy(original.state_dict())
    advice = advise(original, data(), target={"disk": "30 kB", "max_loss": 0.01})
    assert all(torch.equal(v, before[k]) for k, v in original.state_dict().items())
    assert advice.metric == "cosine"
    row = advice.best
    result = tcompress.compress(original, row.recipe, data()[:2])
    sizes = result.report.after
    assert (row.disk, row.memory) == (sizes.disk, sizes.resident)
    with torch.inference_mode():
        expected = [tcompress.distances.cosine(result.model(x), original(x)) for x in data()[2:]]
    assert row.quality == pytest.approx(sum(expected) / 2, rel=1e-6)
    assert row.loss == pytest.approx(1 - row.quality, rel=1e-6)
    assert row.seconds > 0
    assert row.disk <= 30e3
    assert advice.recipe == row.recipe
    assert {r.name for r in advice.rows} >= {"int8", "int4", "W4A16-g64", "int4 gptq", "50 % 8x4 + int8"}


def test_what_misses_the_target_says_by_how_much():
    advice = advise(model(), data(), target={"disk": 10})
    assert advice.best is None
    assert advice.recipe is None
    assert all("MB on disk, 1e-05 allowed" in row.misses[0] for row in advice.rows)
    assert "no candidate keeps to the target" in str(advice)


@pytest.mark.parametrize("maximize", [True, False])
def test_a_metric_of_the_users(maximize):
    """The metric counts the layers that are still torch's: as it is 3, compressed 0."""

    def metric(m):
        return sum(type(layer) is nn.Linear for layer in m.modules())

    advice = advise(model(), data(), metric, {"max_loss": 0.5}, maximize=maximize, candidates=["int8"])
    (row,) = advice.rows
    assert (advice.baseline.quality, row.quality) == (3, 0)
    assert row.loss == (1 if maximize else -1)
    assert row.meets_target is not maximize
    limited = advise(model(), data(), metric, {"metric": 1}, maximize=maximize, candidates=["int8"])
    assert limited.rows[0].meets_target is not maximize


def test_without_data():
    advice = advise(model(), target={"disk": "1 MB"})
    assert all(row.seconds is None and row.quality is None for row in advice.rows)
    assert advice.best is not None
    assert "gptq" not in str(advice)
    assert "what recipes cost in quality was not measured: give data, or a metric" in advice.notes
    advice = advise(model(), target={"latency": "1 ms", "speedup": 2, "max_loss": 0.1, "metric": 1})
    assert len(advice.rows[0].misses) == 4


def test_a_recipe_that_fails_stands_last_with_the_reason():
    wrong = {"steps": [{"scheme": "W8A8", "targets": "Embedding"}]}
    advice = advise(model(), data(), candidates=[wrong, "int8"])
    assert [row.name for row in advice.rows] == ["int8", "recipe 1"]
    assert "match nothing" in advice.rows[1].failure
    assert "failed" in str(advice)
    assert not advice.rows[1].meets_target


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError])
@pytest.mark.parametrize("where", ["compress", "alternate"])
def test_any_error_of_a_candidate_leaves_the_others(monkeypatch, error, where):
    module = sys.modules[tcompress.advise.__module__]
    function, calls = getattr(module, where), []

    def first_fails(*args, **kwargs):
        calls.append(args)
        if len(calls) == 1:
            raise error("sizes do not match")
        return function(*args, **kwargs)

    monkeypatch.setattr(module, where, first_fails)
    advice = advise(model(), data(), candidates=["sparse-int8", "int8"])
    assert [row.name for row in advice.rows] == ["int8", "sparse-int8"]
    assert advice.best.name == "int8"
    assert advice.rows[1].failure.endswith("sizes do not match")
    assert (advice.rows[1].failure == "sizes do not match") is (error is ValueError)


def test_an_error_of_the_metric_names_the_candidate():
    def metric(m):
        if not isinstance(m[0], nn.Linear):
            raise TypeError("no linear layer")
        return 1.0

    text = r"advise: metric: got an error on 'int8' \(TypeError: no linear layer\), expected a number"
    with pytest.raises(RuntimeError, match=text):
        advise(model(), data(), metric, candidates=["int8"])


def test_what_was_left_out_is_told():
    spoiled = torch.full((3, 64), torch.nan)
    advice = advise(model(), [*data(), spoiled], candidates=["int8"])
    assert advice.notes[0] == "1 of 5 calibration samples left out: empty, or with NaN or infinity"
    assert advice.notes[0] in str(advice)


def test_linear_layers_are_timed_in_the_models_type(monkeypatch):
    inputs = [x.bfloat16() for x in data()]
    advice = advise(model().bfloat16(), inputs, candidates=["int8"])
    assert "of a call in torch's bfloat16; alone, by kernel: " in advice.notes[-1]
    assert "float32" in advise(model(), data(), candidates=["int8"]).notes[-1]
    mixed = nn.Sequential(model(), nn.Linear(8, 8).double())
    assert profile(mixed, None).cpu_dtype is None
    elsewhere = dataclasses.replace(profile(model(), data()[0]), cpu_dtype=None)
    monkeypatch.setattr(sys.modules[tcompress.advise.__module__], "profile", lambda *_: elsewhere)
    assert "of a call" not in str(advise(model(), data(), candidates=["int8"]))


def test_a_metric_that_is_nan_keeps_to_no_limit():
    values = iter([1.0, float("nan")])
    advice = advise(model(), data(), lambda m: next(values), {"max_loss": 0.5}, candidates=["int8"])
    assert not advice.rows[0].meets_target


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"target": {"size": 3}}, ValueError, "advise: target.size: got 3, expected one of disk, memory"),
        ({"target": {"disk": "3 apples"}}, ValueError, "advise: target.disk: got '3 apples', expected"),
        ({"target": {"latency": -1}}, ValueError, "advise: target.latency: got -1, expected"),
        ({"target": 3}, TypeError, "advise: target: got int, expected a Target or a dict"),
        ({"metric": 3}, TypeError, "advise: metric: got int, expected a callable"),
        ({"metric": lambda m: "good"}, TypeError, "advise: metric: got str on 'as it is', expected a number"),
        ({"metric": lambda m: m.missing}, RuntimeError, "advise: metric: got an error on 'as it is' .AttributeError"),
        ({"metric": lambda m: float("nan")}, ValueError, "advise: metric: got nan for the model as it is"),
        ({"data": ["text"]}, TypeError, "compress: data: got text"),
        ({"candidates": ["int9"]}, ValueError, "Recipe: recipe: got 'int9'"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    with pytest.raises(error, match=text):
        advise(model(), **arguments)
    with pytest.raises(TypeError, match="advise: model: got int"):
        advise(3)


@pytest.mark.parametrize(
    ("text", "value"), [("25 MB", 25e6), ("1.5gib", 1.5 * 2**30), ("7", 7), ("1e3 B", 1e3), (12, 12)]
)
def test_bytes(text, value):
    assert Target.load({"disk": text, "memory": text}) == Target(disk=value, memory=value)


@pytest.mark.parametrize(("text", "value"), [("8 ms", 8e-3), ("20us", 20e-6), ("0.5", 0.5), ("2 s", 2)])
def test_seconds(text, value):
    assert Target.load({"latency": text}).latency == pytest.approx(value)


def test_the_candidates_follow_from_the_model():
    sparse = profile(model(zeros=0.5), data()[0])
    assert sparse.zeros == pytest.approx(0.5, abs=0.01)
    assert candidates(sparse, True)[0].name == "sparse-int8"
    dense = profile(model(), data()[0])
    assert (dense.tokens, dense.linear) == (3, pytest.approx(1, abs=0.05))
    assert dense.calls == {(3, 96, 64): 1, (3, 64, 96): 1, (3, 8, 64): 1}
    names = [c.name for c in candidates(dense, False)]
    assert names[0] == "int8"
    assert not any("gptq" in name for name in names)
    why = next(c.why for c in candidates(dense, False) if c.name == "int4")
    assert why == "4.5 bits a weight in place of 32, and few tokens: time is that of reading weights"
    half = candidates(profile(model().half(), None), False)
    assert next(c.why for c in half if c.name == "int4") == "4.5 bits a weight in place of 16"


def test_a_profile_counts_tied_weights_once():
    tied = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 10, bias=False))
    tied[1].weight = tied[0].weight
    found = profile(tied, None)
    assert (found.parameters, found.linear, found.embedding, found.tokens) == (160, 1, 0, None)


def test_sensitive_layers_get_eight_bits():
    spiky = nn.Sequential(*(nn.Linear(32, 32) for _ in range(6))).eval()
    spiky[2].weight.data[:, ::7] *= 30  # a group of four bits is coarse for the rest of it, …
    spiky[1].weight.data[::7] = 0  # … and all that counts, since these inputs are zero
    spiky[1].bias.data[::7] = 0
    candidate = next(c for c in candidates(profile(spiky, None), False) if c.name == "int4")
    report = tcompress.compress(spiky, candidate.recipe, torch.randn(16, 32)).report
    mixed = with_sensitive_layers_in_8_bits(candidate, report)
    assert mixed.recipe.steps[0].targets == ("2",)
    layers = tcompress.compress(spiky, mixed.recipe).report.compressed
    assert {r.name for r in layers if r.action == tcompress.Scheme.named("int8").name} == {"2"}
    even = nn.Sequential(*(copy.deepcopy(spiky[0]) for _ in range(3)))
    report = tcompress.compress(even, candidate.recipe, torch.randn(16, 32)).report
    assert with_sensitive_layers_in_8_bits(candidate, report) is None


def test_kernels_are_timed_by_scheme():
    found = kernel_seconds({(2, 32, 64): 3}, [SCHEMES["W8A8"], SCHEMES["W4A8-g32"]], 0.01)
    assert list(found) == ["float32", "W8A8", "W4A8-g32"]
    assert all(value > 0 for value in found.values())
