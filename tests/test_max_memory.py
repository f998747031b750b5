"""Under a limit of memory the result is the same; a limit that is too low is told before anything is done."""

from __future__ import annotations

import copy
import re
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tcompress
from tcompress import solve
from tcompress.errors import CompressionWarning
from tcompress.memory import in_units, nbytes_of, parse_bytes

GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq"}
SPARSEGPT = {"step": "prune", "pattern": "unstructured", "sparsity": 0.5, "algorithm": "sparsegpt"}
AUTOROUND = {**GPTQ, "algorithm": "autoround", "iterations": 8}
HEAD = {"targets": ["*.up", "*.down", "*.gate", "head"]}
SAMPLES = 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(96, 96), nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x):
        return x + self.down(torch.relu(self.gate(x)) * self.up(x))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(96, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def stack():
    torch.manual_seed(0)
    return Stack().eval()


def samples():
    return [torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(i)) for i in range(SAMPLES)]


def compressed(steps, model=None, data=None, **options):
    inputs = options.pop("inputs", "compressed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        recipe = {"steps": steps, "inputs": inputs}
        return tcompress.compress(model or stack(), recipe, data or samples(), progress=False, **options)


@pytest.fixture
def found(monkeypatch):
    """What was planned, how often Hessians were collected, and where files went."""
    seen = {"folders": [], "passes": 0}
    plan, collect, folder = solve.plan, solve.collect, solve.TemporaryDirectory

    def planned(limit, needs):
        seen["needs"], seen["plan"] = needs, plan(limit, needs)
        return seen["plan"]

    def counted(*args):
        for part in collect(*args):
            seen["passes"] += 1
            yield part

    def made(**options):
        made = folder(**options)
        seen["folders"].append(made.name)
        return made

    monkeypatch.setattr(solve, "plan", planned)
    monkeypatch.setattr(solve, "collect", counted)
    monkeypatch.setattr(solve, "TemporaryDirectory", made)
    return seen


def least(steps, found, **options):
    compressed(steps, max_memory=10**12, **options)
    return found["needs"].at_least(0)


def same(one, other):
    expected = other.model.state_dict()
    for key, value in one.model.state_dict().items():
        assert value is None or torch.equal(value, expected[key]), key
    assert one.report.layers == other.report.layers
    assert one.report.warnings == other.report.warnings


RUNS = {
    "gptq": ([GPTQ], {}),
    "both in place": ([SPARSEGPT, GPTQ], {"inplace": True}),
    "floats": ([SPARSEGPT], {}),
    "floats in place": ([SPARSEGPT], {"inplace": True}),
    "autoround": ([AUTOROUND], {}),
    "from gptq": ([{**AUTOROUND, "start": "gptq"}], {}),
    "sequential": ([GPTQ], {"inputs": "sequential"}),
    "original": ([GPTQ], {"inputs": "original"}),
    "propagated": ([{**GPTQ, "propagation": 0.5}], {}),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_least_memory_gives_the_same(name, found):
    steps, options = RUNS[name]
    limit = least(steps, found, **options)
    passes, found["passes"] = found["passes"], 0
    assert not found["plan"].on_disk
    assert not found["folders"]
    result = compressed(steps, max_memory=limit, **options)
    assert found["plan"].on_disk
    assert found["passes"] > passes or name in ("autoround", "from gptq", "sequential")
    (folder,) = found["folders"]
    assert not tempfile.tempdir or folder.startswith(tempfile.tempdir)
    assert not Path(folder).exists()
    same(result, compressed(steps, **options))


def test_activations_are_what_makes_the_difference(found):
    """Between all in memory and the least, each figure is what it says."""
    compressed([GPTQ], max_memory="1 GB")
    needs = found["needs"]
    assert needs.activations == SAMPLES * 2 * 48 * 96 * 4
    assert needs.hessians == 2 * 96 * 96 * 4  # up and gate share one
    assert needs.largest == 96 * 96 * 4
    assert needs.block >= 3 * 2 * 48 * 96 * 4


def test_the_files_go_when_the_run_fails(found, monkeypatch):
    limit = least([GPTQ], found)

    def fails(*args):
        raise RuntimeError("in the middle")

    monkeypatch.setattr(solve, "solve_layer", fails)
    with pytest.raises(RuntimeError, match="in the middle"):
        compressed([GPTQ], max_memory=limit)
    (folder,) = found["folders"]
    assert not Path(folder).exists()


@pytest.mark.parametrize("inplace", [False, True])
def test_too_little_is_told_before_the_run(inplace, found):
    limit = least([SPARSEGPT], found)
    model = stack()
    before = copy.deepcopy(model.state_dict())
    expected = f"compress: max_memory: got {in_units(limit - 1000)}, expected at least {in_units(limit)}; the model on"
    with pytest.raises(ValueError, match=re.escape(expected)):
        compressed([SPARSEGPT], model, max_memory=limit - 1000, inplace=inplace)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_run_under_a_limit_resumes_one_without(tmp_path, found, monkeypatch):
    limit = least([GPTQ], found)
    expected = compressed([GPTQ], resume=tmp_path)
    (tmp_path / "0-2.safetensors").unlink()
    same(compressed([GPTQ], resume=tmp_path, max_memory=limit), expected)
    assert found["plan"].on_disk


def test_steps_that_do_not_keep_to_it_are_named():
    result = compressed([{"step": "quantize", "scheme": "W8A8"}], max_memory="1 GB")
    assert any(note.startswith("max_memory: ") for note in result.report.warnings)


@pytest.mark.parametrize(
    ("value", "nbytes"),
    [(700, 700), ("700", 700), ("700MB", 700e6), (" 1.5 GiB ", 1.5 * 2**30), ("2kb", 2000), (1e9, 10**9)],
)
def test_bytes(value, nbytes):
    assert parse_bytes(value, "max_memory") == nbytes


@pytest.mark.parametrize("value", ["much", "", "-1 MB", "1 parsec", 0, -5, True, float("nan"), [1]])
def test_no_bytes(value):
    with pytest.raises(ValueError, match="compress: max_memory: got .*, expected a positive number of bytes"):
        tcompress.compress(stack(), max_memory=value)


def test_bytes_in_words():
    assert [in_units(n) for n in (12, 1234, 99_900_000, 538_060_000, 2.5e9)] == [
        *("12 B", "1.2 kB", "99.9 MB", "538 MB", "2.5 GB"),
    ]
    assert nbytes_of({"a": (torch.zeros(3), [torch.zeros(2, dtype=torch.int8)]), "b": None}) == 14
