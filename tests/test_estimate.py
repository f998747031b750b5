"""The estimate of a run against what is then measured; the model stays as it is."""

from __future__ import annotations

import copy
import io
import sys
import warnings

import pytest
import torch
import transformers as hf
from rich.console import Console

import tcompress
from tcompress import expected_run
from tcompress.errors import CompressionWarning
from tcompress.live_tensors import LiveTensors

GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq"}
SPARSEGPT = {"step": "prune", "pattern": "unstructured", "sparsity": 0.5, "algorithm": "sparsegpt"}
WANDA = {**SPARSEGPT, "algorithm": "wanda"}
AUTOROUND = {**GPTQ, "algorithm": "autoround", "iterations": 4}
FINETUNE = {"step": "finetune", "steps": 2}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def llama():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=1000, pad_token_id=0, **SIZES)).eval()


def data(n=6):
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(1, 1000, (1, 64), generator=generator)} for _ in range(n)]


def measured(model, recipe, **options):
    with LiveTensors([*model.parameters(), *model.buffers()]) as live, warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        tcompress.compress(model, recipe, data(), progress=False, **options)
    return live.peak


@pytest.mark.parametrize(
    ("recipe", "inplace"),
    [
        ("int8", False),
        ("int4", True),
        ({"steps": [GPTQ]}, False),
        ({"steps": [GPTQ]}, True),
        ({"steps": [SPARSEGPT]}, False),
        ({"steps": [SPARSEGPT]}, True),
        ({"steps": [AUTOROUND]}, False),
        ({"steps": [GPTQ, FINETUNE]}, False),
        ({"steps": [GPTQ, FINETUNE], "samples": 2}, True),
        ({"steps": [GPTQ | {"scheme": "W8A8-static"}]}, True),
        ({"steps": [AUTOROUND], "inputs": "original"}, True),
        ({"steps": [FINETUNE | {"step": "distill", "lr": 1e-3}, {"scheme": "W8A8"}]}, False),
    ],
)
def test_memory_is_within_half_of_what_is_measured(recipe, inplace):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    expected = tcompress.estimate(model, recipe, data(), inplace=inplace, seconds=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())
    peak = measured(model, recipe, inplace=inplace)
    assert peak / 1.5 < expected.memory.peak < peak * 1.5


def test_in_place_the_original_is_copied_for_a_step_that_trains():
    recipe = {"steps": [GPTQ, FINETUNE]}
    apart, inplace = (tcompress.estimate(llama(), recipe, data(), inplace=i, seconds=0).memory for i in (False, True))
    size = sum(p.nbytes for p in llama().parameters())
    assert inplace.when == apart.when == "training"
    assert inplace.model - apart.model == pytest.approx(size, rel=0.01)
    assert inplace.peak - apart.peak == inplace.model - apart.model


@pytest.mark.parametrize(
    ("recipe", "waits"),
    [
        ({"steps": [GPTQ]}, False),
        ({"steps": [{"scheme": "W8A8", "bias_correction": True}]}, False),
        ({"steps": [AUTOROUND]}, False),
        ({"steps": [AUTOROUND], "inputs": "original"}, True),
        ({"steps": [GPTQ | {"scheme": "W8A8-static"}]}, True),
        ({"steps": [{"attention": "int8"}, GPTQ]}, True),
        ({"steps": [GPTQ, FINETUNE]}, True),
    ],
)
def test_what_becomes_of_layers_that_wait_for_the_end_is_counted(recipe, waits, monkeypatch):
    swapping, given = sys.modules["tcompress.swap_layers"], []
    solve = swapping.solve

    def watched(*args):
        given.append(args[-1])
        return solve(*args)

    monkeypatch.setattr(swapping, "solve", watched)
    measured(llama(), recipe, inplace=True)
    assert (given[0] is None) == waits
    monkeypatch.setattr(expected_run, "training_memory", lambda *_: (0, 0))  # which would be the most
    estimates = (tcompress.estimate(llama(), recipe, data(200), inplace=place, seconds=0) for place in (False, True))
    apart, inplace = (found.memory for found in estimates)
    assert inplace.when == apart.when == "solving layers"
    assert apart.compressed == (1 if waits else 2) * inplace.compressed


def test_memory_under_a_limit():
    model = llama()
    free = tcompress.estimate(model, {"steps": [GPTQ]}, data(200), inplace=True, seconds=0)
    assert free.memory.when == "solving layers"
    assert free.memory.activations == 200 * 64 * 64 * 4
    bound = tcompress.estimate(model, {"steps": [GPTQ]}, data(200), inplace=True, max_memory="3 MB", seconds=0)
    assert bound.memory.activations == 0
    assert bound.memory.peak < free.memory.peak
    beside = bound.memory.activations + bound.memory.hessians + bound.memory.work
    assert beside <= 3e6
    with pytest.raises(ValueError, match="compress: max_memory: got 10.0 kB, expected at least [0-9.]+ MB; "):
        tcompress.estimate(model, {"steps": [GPTQ]}, data(), max_memory=10_000)


def test_more_data_takes_longer():
    short, long = (tcompress.estimate(llama(), {"steps": [GPTQ]}, data(n), seconds=0) for n in (2, 100))
    for part in ("forward", "statistics", "comparing"):
        assert getattr(long.time, part) > 2 * getattr(short.time, part) > 0
    total = long.time.forward + long.time.statistics + long.time.solving + long.time.comparing
    assert long.time.total == pytest.approx(total)


def test_layers_that_were_not_measured_are_taken_in_proportion(monkeypatch):
    seen = []

    def solved(job, match, by_data):
        seen.append(tuple(job.module.weight.shape))
        return expected_run._cost(job) * 1e-6

    monkeypatch.setattr(expected_run, "_solved_in", solved)
    # 64 x 64: q, k, v, o; 128 x 64: gate, up; 64 x 128: down
    cost = 4 * (2 * 64**3) + 2 * (128 * 64**2 + 64**3) + (64 * 128**2 + 128**3)
    for seconds, shapes in ((0, [(64, 64)]), (60, [(64, 64), (128, 64), (64, 128)])):
        seen.clear()
        found = tcompress.estimate(llama(), {"steps": [GPTQ]}, data(), seconds=seconds)
        assert seen == shapes
        assert found.time.solving == pytest.approx(2 * cost * 1e-6)


@pytest.mark.parametrize("step", ["finetune", "distill"])
def test_training(step):
    def seconds(**options):
        steps = [GPTQ, {**FINETUNE, "step": step, **options}]
        return tcompress.estimate(llama(), {"steps": steps}, data(), seconds=0).time.training

    short, long, accumulated = seconds(), seconds(steps=50), seconds(steps=50, accumulate=4)
    assert 2 * short < long < accumulated / 2
    assert tcompress.estimate(llama(), {"steps": [GPTQ]}, data(), seconds=0).time.training == 0


def test_only_the_recipes_samples_are_solved_on():
    few, all_of_them = (
        tcompress.estimate(llama(), {"steps": [GPTQ], "samples": n}, data(60), seconds=0) for n in (3, None)
    )
    assert 20 * few.memory.activations == all_of_them.memory.activations
    assert 5 * few.time.statistics < all_of_them.time.statistics


def test_without_data():
    found = tcompress.estimate(llama(), "int8")
    assert found.memory.activations == found.memory.hessians == 0
    assert found.time.forward == found.time.comparing == 0
    assert found.samples == 0
    with pytest.raises(ValueError, match="estimate: data: got none, expected calibration samples"):
        tcompress.estimate(llama(), {"steps": [GPTQ]})
    with pytest.raises(ValueError, match="estimate: data: got none, expected calibration samples; finetune needs"):
        tcompress.estimate(llama(), {"steps": [{"scheme": "W4A16"}, FINETUNE]})
    with pytest.raises(TypeError, match="estimate: model"):
        tcompress.estimate("llama")


def test_a_limit_that_no_step_keeps_to_is_told():
    def notes(*steps):
        return tcompress.estimate(llama(), {"steps": steps}, data(), max_memory="1 GB", seconds=0).notes

    note = "max_memory: of this recipe's steps only algorithms with data that prune and quantize keep to it"
    assert notes({"scheme": "W8A8"}) == notes(GPTQ, FINETUNE) == (note,)
    assert notes(GPTQ) == ()


def test_static_activations_without_data():
    for call, where in ((tcompress.estimate, "estimate"), (tcompress.compress, "compress")):
        with pytest.raises(ValueError, match=f"{where}: data: got none, expected calibration samples; W8A8-static has"):
            call(llama(), {"steps": [{"scheme": "W8A8-static"}]})


def test_samples_are_those_that_are_looked_at():
    found = tcompress.estimate(llama(), {"steps": [GPTQ], "samples": 4}, data(), seconds=0)
    assert found.samples == 4
    assert "14 layers, 4 samples: about " in found.line
    assert tcompress.estimate(llama(), {"steps": [GPTQ], "samples": 40}, data(), seconds=0).samples == 6


def test_projections_of_attention_that_is_converted_are_measured(monkeypatch):
    """torch's attention reads its projections' weights: as layers they are called in what takes its place."""
    torch.manual_seed(0)
    layer = torch.nn.TransformerEncoderLayer(64, 4, 128, batch_first=True)
    model = torch.nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    recipe, samples = {"steps": [{"attention": "int8"}, GPTQ]}, [torch.randn(2, 16, 64) for _ in range(4)]
    needs, needs_of = [], expected_run.needs_of

    def watched(*args):
        needs.append(needs_of(*args))
        return needs[-1]

    for module in (expected_run, sys.modules["tcompress.solve"]):
        monkeypatch.setattr(module, "needs_of", watched)
    expected = tcompress.estimate(model, recipe, samples, max_memory="1 GB", seconds=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        tcompress.compress(model, recipe, samples, max_memory="1 GB", progress=False)
    assert needs[0].hessians == needs[1].hessians == expected.memory.hessians > 0
    assert needs[0] == needs[1]


def test_a_recipe_for_attention_alone():
    found = tcompress.estimate(llama(), {"steps": [{"attention": "int8"}]}, data(), inplace=True, seconds=0)
    assert found.layers == found.memory.hessians == found.memory.compressed == 0
    assert found.memory.peak > found.memory.model
    assert found.time.total > 0


def test_what_it_says():
    found = tcompress.estimate(llama(), {"steps": [{"step": "smooth"}, GPTQ]}, data(), seconds=0)
    text = str(found)
    for word in (
        "model",
        "activations",
        "hessians",
        "compressed",
        "work",
        "peak",
        "solving",
        "training",
        "total",
        "6 samples",
    ):
        assert word in text
    assert found.notes == ("not in it: smooth",)
    assert "not in it: smooth" in text
    assert "14 layers, 6 samples: about " in found.line


@pytest.mark.parametrize(("terminal", "samples"), [(True, 8), (True, 7), (False, 8)])
def test_a_long_run_says_what_it_will_take(monkeypatch, terminal, samples):
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=200)
    monkeypatch.setattr(sys.modules["tcompress.compress"], "get_console", lambda: console)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        result = tcompress.compress(llama(), {"steps": [WANDA]}, data(samples))
    assert ("14 layers, 8 samples: about " in text.getvalue()) == (terminal and samples == 8)
    assert len(result.report.compressed) == 14
