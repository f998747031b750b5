"""In place, a block's layers are compressed when the block is done, and their floats go."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from test_resume_run import AUTOROUND, BLOCKS, GPTQ, SPARSEGPT, Stack
from torch import nn

import tcompress
from tcompress import in_place, solve
from tcompress.errors import CompressionWarning
from tcompress.nn import QuantizedLinear

W8A8 = {"step": "quantize", "scheme": "W8A8", "algorithm": "gptq"}


def stack(cls=Stack):
    torch.manual_seed(0)
    return cls().eval()


def samples():
    return [torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]


def compressed(model, steps, inputs="compressed", **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        recipe = {"steps": steps, "inputs": inputs}
        return tcompress.compress(model, recipe, samples(), progress=False, **options)


@pytest.mark.parametrize("inputs", ["compressed", "original", "sequential"])
@pytest.mark.parametrize("steps", [[GPTQ], [W8A8], [SPARSEGPT, GPTQ], [{**GPTQ, "outliers": 1.5}], [AUTOROUND]])
def test_the_result_is_that_of_a_copy(steps, inputs):
    expected, result = compressed(stack(), steps, inputs), compressed(stack(), steps, inputs, inplace=True)
    for key, value in expected.model.state_dict().items():
        got = result.model.state_dict()[key]
        assert value is got is None or torch.equal(value, got), key
    reports = list(zip(expected.report.layers, result.report.layers, strict=True))
    assert len(reports) == 2 * BLOCKS + 1
    for one, other in reports:
        assert one.model_copy(update={"output_sqnr_db": None}) == other.model_copy(update={"output_sqnr_db": None})
        # On the inputs in the model under way, not in the original.
        assert one.output_sqnr_db == pytest.approx(other.output_sqnr_db, abs=3)
    first = [(a.output_sqnr_db, b.output_sqnr_db) for a, b in reports if a.name == "layers.0.up"]
    assert first[0][0] == pytest.approx(first[0][1])
    assert result.report.output_cosine == expected.report.output_cosine


class Bare(Stack):
    """Its blocks are linear layers themselves."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(BLOCKS))


@pytest.mark.parametrize("scheme", ["W4A16-g32", "W4A8-g32"])
def test_blocks_that_are_layers(scheme):
    steps = [{**GPTQ, "scheme": scheme}]
    expected, result = compressed(stack(Bare), steps), compressed(stack(Bare), steps, inplace=True)
    for key, value in expected.model.state_dict().items():
        got = result.model.state_dict()[key]
        assert value is got is None or torch.equal(value, got), key
    for one, other in zip(expected.report.layers, result.report.layers, strict=True):
        assert one.output_sqnr_db == pytest.approx(other.output_sqnr_db, abs=3)


def test_floats_go_with_their_block(monkeypatch):
    model, seen = stack(), []
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    solved = solve.solve_layer

    def watched(job, found):
        seen.append(sum(module.weight.untyped_storage().nbytes() // (32 * 64 * 4) for module in linears))
        return solved(job, found)

    monkeypatch.setattr(solve, "solve_layer", watched)
    compressed(model, [GPTQ], inplace=True)
    assert seen == [8, 8, 6, 6, 4, 4, 2, 2, 0]
    assert not any(isinstance(module, nn.Linear) for module in model.modules())


def test_a_run_that_fails_leaves_a_model_that_runs(monkeypatch):
    model, solved = stack(), solve.solve_layer

    def fails(job, found):
        if job.name == "layers.2.up":
            raise RuntimeError("in the middle")
        return solved(job, found)

    monkeypatch.setattr(solve, "solve_layer", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        compressed(model, [GPTQ], inplace=True)
    assert [type(layer.up) for layer in model.layers] == [*2 * [QuantizedLinear], *2 * [nn.Linear]]
    expected = compressed(stack(), [GPTQ | {"targets": ["layers.0.*", "layers.1.*"]}]).model
    assert torch.equal(model(samples()[0]), expected(samples()[0]))


@pytest.mark.parametrize("where", ["compressed_report", "put", "trim"])
def test_an_interrupt_while_a_block_takes_its_places(where, monkeypatch):
    """While the reports of a block are made, before its layers are put in, and between two blocks."""
    model, calls, inner = stack(), 0, getattr(in_place, where)

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return inner(*args)

    monkeypatch.setattr(in_place, where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compressed(model, [GPTQ], inplace=True)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linears) < 2 * BLOCKS + 1
    for module in linears:
        assert module.weight.count_nonzero() == module.weight.numel()
    expected = stack()(samples()[0])
    assert torch.cosine_similarity(model(samples()[0]).flatten(), expected.flatten(), 0) > 0.9


def test_training_flags_and_hooks_stay():
    model = stack().train()
    model.layers[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    compressed(model, [GPTQ], inplace=True)
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in model.modules())


class Tied(Stack):
    """Both blocks' first layers, and a layer that no step means, have weights that others use too."""

    def __init__(self):
        super().__init__()
        self.twin = nn.Linear(32, 64)
        self.twin.weight = self.layers[1].up.weight

    def forward(self, x):
        return super().forward(x) + self.twin(x).sum()


def test_a_weight_that_is_used_elsewhere_stays():
    model = stack(Tied)
    before = copy.deepcopy(model.twin.weight)
    expected = compressed(stack(Tied), [GPTQ | {"ignore": ["twin"]}]).model
    compressed(model, [GPTQ | {"ignore": ["twin"]}], inplace=True)
    assert torch.equal(model.twin.weight, before)
    for key, value in expected.state_dict().items():
        assert value is None or torch.equal(value, model.state_dict()[key]), key


@pytest.mark.parametrize("steps", [[GPTQ], [SPARSEGPT], [SPARSEGPT, GPTQ]])
def test_it_resumes(tmp_path, steps):
    expected = compressed(stack(), steps, inplace=True, resume=tmp_path)
    for stage in ("0-2", "0-3", "rest"):
        (tmp_path / f"{stage}.safetensors").unlink()
    result = compressed(stack(), steps, inplace=True, resume=tmp_path)
    for key, value in expected.model.state_dict().items():
        assert value is result.model.state_dict()[key] is None or torch.equal(value, result.model.state_dict()[key]), (
            key
        )
    assert result.report.layers == expected.report.layers
    assert result.report.warnings == expected.report.warnings


def test_a_model_that_is_one_layer_is_refused_before_it_is_solved(monkeypatch):
    monkeypatch.setattr("tcompress.swap_layers.solve", None)
    with pytest.raises(ValueError, match="inplace: got True for a model that is one layer"):
        tcompress.compress(nn.Linear(64, 64), {"steps": [GPTQ]}, [torch.randn(4, 64)], inplace=True)
