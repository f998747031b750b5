"""A run of algorithms with data that is killed and goes on."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tcompress
from tcompress import solve, transform
from tcompress.errors import CompressionWarning

GPTQ = {"step": "quantize", "scheme": "W4A16-g32", "algorithm": "gptq"}
SPARSEGPT = {"step": "prune", "pattern": "unstructured", "sparsity": 0.5, "algorithm": "sparsegpt"}
AUTOROUND = {**GPTQ, "algorithm": "autoround"}
BLOCKS = 4


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.head = nn.Linear(32, 5)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def compressed(steps, folder=None, model=None):
    if model is None:
        torch.manual_seed(0)
        model = Stack().eval()
    data = [torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    data[1][0, 0] = 1e38  # finite, and infinite after the first layer: there is something to warn of
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompressionWarning)
        return tcompress.compress(model, {"steps": steps}, data, resume=folder, progress=False)


def state(result):
    return {k: v for k, v in result.model.state_dict().items() if v is not None}


def same(one, other):
    assert state(one).keys() == state(other).keys()
    for key, value in state(one).items():
        assert torch.equal(value, state(other)[key]), key
    assert one.report.warnings == other.report.warnings
    assert one.report.layers == other.report.layers


def killed(tmp_path, name, after):
    """The same run in another process, which is killed when so many stages have been kept."""
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
torch.set_num_threads({torch.get_num_threads()})
import test_resume_run as run
from tcompress.resume import StageStore
save, done = StageStore.save, []
def counted(self, *args):
    save(self, *args)
    done.append(1)
    if len(done) == {after}:
        os.kill(os.getpid(), signal.SIGKILL)
StageStore.save = counted
run.compressed(run.RECIPES[{name!r}], {str(tmp_path)!r})
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9


RECIPES = {
    "gptq": [GPTQ],
    "both": [SPARSEGPT, GPTQ],
    "floats": [SPARSEGPT],
    "autoround": [AUTOROUND],
    "transforms": [{"step": "smooth"}, {"step": "awq"}, GPTQ],
}


@pytest.mark.parametrize(
    ("name", "after"), [("gptq", 1), ("gptq", 3), ("gptq", 5), ("both", 2), ("floats", 3), ("autoround", 2)]
)
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path, name, after, monkeypatch):
    killed(tmp_path, name, after)
    assert len(list(tmp_path.glob("*.safetensors"))) == after
    solved = []
    layer = solve.solve_layer
    monkeypatch.setattr(solve, "solve_layer", lambda job, found: solved.append(job.name) or layer(job, found))
    result = compressed(RECIPES[name], tmp_path)
    if name != "autoround":  # whose layers are solved together
        assert len(solved) == 2 * BLOCKS + 1 - min(2 * after, 2 * BLOCKS + 1)
    same(result, compressed(RECIPES[name]))


@pytest.mark.parametrize("after", [1, 4])
def test_a_run_with_transforms_that_was_killed_goes_on(tmp_path, after, monkeypatch):
    """`test_resume_transforms` has more of them, without another process."""
    killed(tmp_path, "transforms", after)
    assert (tmp_path / f"transform-{min(after, 2) - 1}.safetensors").is_file()
    assert len(list((tmp_path / "layers").glob("*.safetensors"))) == max(after - 2, 0)
    ran = []
    for kind, run in list(transform._RUN.items()):
        monkeypatch.setitem(transform._RUN, kind, lambda work, step, run=run: ran.append(step.step) or run(work, step))
    result = compressed(RECIPES["transforms"], tmp_path)
    assert ran == ["smooth", "awq"][after:]
    same(result, compressed(RECIPES["transforms"]))


def test_a_finished_run_is_read_again(tmp_path, monkeypatch):
    expected = compressed(RECIPES["gptq"], tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *(f"0-{i}.safetensors" for i in range(BLOCKS)),
        "rest.safetensors",
        "run.json",
    ]
    monkeypatch.setattr(solve, "solve_layer", None)
    same(compressed(RECIPES["gptq"], tmp_path), expected)


def test_a_folder_of_another_run_is_refused(tmp_path):
    compressed(RECIPES["gptq"], tmp_path)
    with pytest.raises(ValueError, match="compress: resume: got .*, the folder of another run, expected its own; "):
        compressed(RECIPES["floats"], tmp_path)
    model = Stack().eval()
    with pytest.raises(ValueError, match="the folder of another run"):
        compressed(RECIPES["gptq"], tmp_path, model)


def test_a_damaged_stage_stops_the_run(tmp_path):
    compressed(RECIPES["gptq"], tmp_path)
    (tmp_path / "0-2.safetensors").write_bytes(b"\0")
    with pytest.raises(ValueError, match="compress: resume: got .*0-2.safetensors, damaged"):
        compressed(RECIPES["gptq"], tmp_path)
