"""The loop: what it computes, what it keeps of a run that was stopped, and what it refuses."""

import copy
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from toy_models import Toy, batches

import tcompress
from tcompress.distill.batches import Batches
from tcompress.recipe.training import Training

pytest.importorskip("accelerate", reason="the engine of training: pip install tcompress[train]")


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distilled(start=1, data=None, teacher=None, **settings):
    student = Toy(seed=start)
    settings = {"losses": ["logits", "hidden"], "steps": 12, "lr": 3e-3, **settings}
    result = tcompress.distill(student, teacher or Toy(seed=0), batches() if data is None else data, **settings)
    assert result.model is student
    return result


def test_a_student_learns():
    teacher = Toy(seed=0)
    before = weights(teacher).clone()
    result = distilled(teacher=teacher, steps=60, lr=1e-2)
    losses = [step["total"] for step in result.history.losses]
    assert len(losses) == 60
    assert losses[-1] < 0.5 * losses[0]
    assert all(s["total"] == pytest.approx(s["logits"] + s["hidden"], rel=1e-5) for s in result.history.losses)
    assert torch.equal(weights(teacher), before)
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())
    assert result.model.training


def test_one_step_by_hand():
    """AdamW's first step moves each weight by lr · sign of the gradient, decay aside."""
    teacher, student = Toy(seed=0), Toy(seed=1)
    data = batches(1)
    model = copy.deepcopy(student).eval()
    mask = data[0]["attention_mask"].bool()
    log_p, log_q = (torch.log_softmax(m(**data[0]) / 2, -1) for m in (teacher.eval(), model))
    (4 * (log_p.exp() * (log_p - log_q)).sum(-1)[mask].mean()).backward()
    old = {name: p.detach().clone() for name, p in student.named_parameters()}
    settings = {"steps": 1, "lr": 1e-3, "warmup": 0, "weight_decay": 0.1, "schedule": "constant", "max_grad_norm": None}
    tcompress.distill(student, teacher, data, **settings)
    for (name, p), q in zip(student.named_parameters(), model.parameters(), strict=True):
        gradient = torch.zeros_like(p) if q.grad is None else q.grad
        kept = 1 - 1e-3 * 0.1 if p.dim() > 1 else 1.0
        expected = old[name] * kept - 1e-3 * gradient / (gradient.abs() + 1e-8)
        clear = (gradient.abs() > 1e-5) | (gradient == 0)
        assert torch.allclose(p.detach()[clear], expected[clear], atol=2e-6), name


def test_the_learning_rate():
    linear = Training(steps=10, lr=1.0, warmup=0.2)
    assert [linear.lr_at(s) for s in (0, 1, 2, 6, 9)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5, 0.125])
    cosine = Training(steps=10, lr=1.0, warmup=0, schedule="cosine")
    assert [cosine.lr_at(s) for s in (0, 5)] == pytest.approx([1, 0.5])
    assert cosine.lr_at(9) == pytest.approx(0.5 * (1 + math.cos(0.9 * math.pi)))
    assert Training(steps=3, lr=0.1, warmup=0, schedule="constant").lr_at(2) == 0.1


def test_gradients_are_clipped():
    norms = []
    real = torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(torch.stack([g.norm() for g in grads]).norm()))
        return real(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        distilled(steps=2, max_grad_norm=1e-3)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)


def test_a_seed_decides():
    torch.manual_seed(5)
    here = torch.get_rng_state()
    first = distilled(dropout=True).model
    assert torch.equal(torch.get_rng_state(), here)  # the caller's random numbers go on where they were
    torch.manual_seed(6)
    assert torch.equal(weights(distilled(dropout=True).model), weights(first))
    assert not torch.equal(weights(distilled(dropout=True, seed=1).model), weights(first))
    assert not torch.equal(weights(distilled(dropout=False).model), weights(first))


def test_accumulating_is_one_larger_batch():
    halves = [{k: v[i : i + 2] for k, v in batches(1)[0].items()} for i in (0, 2)]
    for half in halves:
        half["attention_mask"] = torch.ones_like(half["attention_mask"])
    whole = [{k: torch.cat([h[k] for h in halves]) for k in halves[0]}]
    runs = [distilled(data=d, steps=4, accumulate=n, losses=["logits"]).history for d, n in ((halves, 2), (whole, 1))]
    totals = [[step["total"] for step in run.losses] for run in runs]
    assert totals[0] == pytest.approx(totals[1], rel=1e-4)


def test_evaluation():
    seen = []

    def evaluate(student):
        assert not student.training
        assert not torch.is_grad_enabled()
        seen.append(weights(student).clone())
        return {"n": len(seen)}

    result = distilled(steps=5, eval_every=2, evaluate=evaluate)
    assert result.history.metrics == [(0, {"n": 1}), (2, {"n": 2}), (4, {"n": 3}), (5, {"n": 4})]
    assert torch.equal(seen[0], weights(Toy(seed=1)))
    assert torch.equal(seen[3], weights(result.model))


LOADERS = {
    "list": lambda: batches(),
    "loader": lambda: DataLoader(TensorDataset(torch.cat([b["input_ids"] for b in batches()])), 3, shuffle=True),
    "own generator": lambda: DataLoader(
        TensorDataset(torch.cat([b["input_ids"] for b in batches()])), 3, shuffle=True, generator=torch.Generator()
    ),
}


@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.parametrize("processes", [1, 2])
def test_batches_go_on_in_the_middle(kind, processes):
    def taken(after, process=0, n=20):
        stream = Batches(LOADERS[kind](), 3, process, processes).after(after)
        return [(b if kind != "list" else [b["input_ids"]])[0] for _, b in zip(range(n), stream, strict=False)]

    whole = taken(0)
    assert all(torch.equal(a, b) for a, b in zip(taken(9, n=11), whole[9:], strict=True))
    if processes == 2:
        assert not torch.equal(taken(0, process=1)[0], whole[0])
    rows = torch.cat([b["input_ids"] for b in batches()]).shape[0]
    if processes == 1:  # each round has every row once
        count = 5 if kind == "list" else 7
        for start in (0, count):
            rows_seen = torch.cat(whole[start : start + count])
            assert len(rows_seen) == rows
            everything = torch.cat([b["input_ids"] for b in batches()])
            assert sorted(map(tuple, rows_seen.tolist())) == sorted(map(tuple, everything.tolist()))
        assert not torch.equal(whole[0], whole[count])  # in another order


def test_data_that_can_be_gone_through_once():
    result = distilled(data=iter(batches(3)), steps=8)
    assert torch.equal(weights(result.model), weights(distilled(data=batches(3), steps=8).model))
    with pytest.raises(ValueError, match="data: got no batches, expected at least one"):
        distilled(data=DataLoader(TensorDataset(torch.zeros(0, 4))))


class Stopped(Exception):
    pass


def evaluation(stop=None):
    """The sum of the weights; or, at the call of this number, the end."""
    calls = 0

    def evaluate(model):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise Stopped
        return float(weights(model).sum())

    return evaluate


@pytest.mark.parametrize("kind", ["list", "loader"])
@pytest.mark.parametrize("prune", [None, "magnitude", "movement", "admm"])
def test_a_run_that_was_stopped_goes_on(tmp_path, prune, kind):
    settings = {"dropout": True, "save_every": 2, "eval_every": 1}
    if prune is not None:
        settings["prune"] = {"method": prune, "pattern": "unstructured", "sparsity": 0.5, "every": 2}

    class Loader:  # of mappings, as the models take them
        def __iter__(self):
            return ({"input_ids": ids} for (ids,) in LOADERS["loader"]())

    data = batches() if kind == "list" else Loader()
    folder = tmp_path / "run"
    whole = distilled(data=data, evaluate=evaluation(), **settings)
    for stop, left in ((2, []), (8, ["step-00000006"]), (6, ["step-00000010"])):
        with pytest.raises(Stopped):
            distilled(data=data, evaluate=evaluation(stop), checkpoint=str(folder), **settings)
        assert [p.name for p in folder.glob("step-*")] == left
    resumed = distilled(data=data, evaluate=evaluation(), checkpoint=str(folder), **settings)
    assert torch.equal(weights(resumed.model), weights(whole.model))
    assert resumed.history == whole.history
    again = distilled(data=data, evaluate=evaluation(1), checkpoint=str(folder), **settings)  # a run that is done
    assert torch.equal(weights(again.model), weights(whole.model))


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import os
import torch
import tcompress
from toy_models import Toy, batches
folder, kill = sys.argv[1], int(sys.argv[2])
def evaluate(model):
    if kill and sum(1 for _ in open(folder + "/calls")) == kill:
        os._exit(9)
    open(folder + "/calls", "a").write("x\\n")
    return 0.0
student = Toy(seed=1)
tcompress.distill(student, Toy(seed=0), batches(), losses=["logits", "hidden", "relations"], steps=12, lr=3e-3,
    dropout=True, save_every=2, eval_every=1, evaluate=evaluate, checkpoint=folder + "/run", progress=False)
torch.save(student.state_dict(), folder + "/student.pt")
"""


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on(tmp_path):
    """Processes that are killed at three points: the result is that of one that was not, bit for bit."""
    script = tmp_path / "run.py"
    script.write_text(textwrap.dedent(SCRIPT.format(tests=str(Path(__file__).parent))))

    def run(folder, kill):
        command = [sys.executable, str(script), str(folder), str(kill)]
        return subprocess.run(command, env=os.environ, capture_output=True, text=True)

    for kills in ((0,), (2, 7, 10, 0)):
        folder = tmp_path / str(len(kills))
        folder.mkdir()
        (folder / "calls").touch()
        for kill in kills:
            done = run(folder, kill)
            assert done.returncode == (9 if kill else 0), done.stderr
    states = [torch.load(tmp_path / name / "student.pt") for name in ("1", "4")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


SHARED = """
import sys
sys.path.insert(0, {tests!r})
import torch
import tcompress
from toy_models import Toy, batches
student = Toy(seed=1)
tcompress.distill(student, Toy(seed=0), batches(6), losses=["hidden"], steps=3, schedule="constant", progress=False,
    lr=1e-3, accumulate=int(sys.argv[2]), prune={{"method": "movement", "pattern": "2:4"}}, max_grad_norm=None)
import torch.distributed as dist
assert dist.is_initialized() == (sys.argv[2] == "1")
if not dist.is_initialized() or dist.get_rank() == 0:
    torch.save(student.state_dict(), sys.argv[1])
"""


@pytest.mark.slow
def test_two_processes_are_one_with_twice_as_many_batches(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SHARED.format(tests=str(Path(__file__).parent)))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for more, accumulate in (([], 2), (launch, 1)):
        out = tmp_path / f"{accumulate}.pt"
        command = [sys.executable, *more, str(script), str(out), str(accumulate)]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    one, two = (torch.load(tmp_path / f"{n}.pt") for n in (2, 1))
    for name in one:
        # AdamW's first steps are as large for a gradient of rounding errors as for any other.
        close = torch.isclose(one[name], two[name], atol=1e-5)
        assert close.float().mean() > 0.97, name


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    distilled(steps=2, checkpoint=tmp_path)
    with pytest.raises(
        ValueError, match="distill: checkpoint: got .* other settings.*they differ in distill, training"
    ):
        distilled(steps=3, checkpoint=str(tmp_path))
    with pytest.raises(ValueError, match="they differ in student"):
        distilled(start=9, steps=2, checkpoint=str(tmp_path))
    assert len(distilled(steps=2, eval_every=1, checkpoint=str(tmp_path)).history.losses) == 2


def test_what_is_trained():
    student = Toy(seed=1)
    old = {name: p.detach().clone() for name, p in student.named_parameters()}
    student.head.bias.requires_grad_(False)
    tcompress.distill(student, Toy(seed=0), batches(), steps=2, lr=1e-2, targets=["layers.*", "head"], ignore=["up"])
    changed = {name for name, p in student.named_parameters() if not torch.equal(p, old[name])}
    assert changed == {n for n in old if n.split(".")[0] in ("layers", "head") and ".up." not in n}
    assert not student.head.bias.requires_grad
    assert student.head.weight.requires_grad
    with pytest.raises(ValueError, match=r"distill: targets: got \['nothing'\], which match no parameter"):
        tcompress.distill(student, Toy(seed=0), batches(), targets="nothing")


def test_a_loss_that_is_not_finite():
    teacher = Toy(seed=0)
    data = [torch.randn(2, 16) for _ in range(3)]
    data[1][0, 0] = math.nan
    with pytest.raises(ValueError, match="distill: loss: got logits nan at step [123], expected a finite one"):
        tcompress.distill(nn.Linear(16, 4), nn.Linear(16, 4), data, steps=3)
    with torch.no_grad():
        teacher.head.bias[0] = math.inf
    with pytest.raises(ValueError, match="the teacher's output: got NaN or infinity, expected finite"):
        distilled(teacher=teacher)


def test_without_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ImportError, match=r"distill: accelerate: got .*, expected it; pip install tcompress\[train\]"):
        distilled()


def test_tied_weights_in_a_checkpoint(tmp_path):
    class Tied(Toy):
        def __init__(self, seed):
            super().__init__(classes=20, seed=seed)
            self.head.weight = self.embedding.weight

    def run(steps_before_stop=None):
        def evaluate(model, calls=[]):  # noqa: B006
            calls.append(1)
            if len(calls) == steps_before_stop:
                raise KeyboardInterrupt
            return 0.0

        student = Tied(1)
        folder = str(tmp_path / "run") if steps_before_stop is not None else None
        settings = {"steps": 6, "save_every": 1, "eval_every": 1, "checkpoint": folder, "evaluate": evaluate}
        return tcompress.distill(student, Tied(0), batches(), **settings).model

    with pytest.raises(KeyboardInterrupt):
        run(4)
    resumed, whole = run(0), run()
    assert resumed.head.weight is resumed.embedding.weight
    assert torch.equal(weights(resumed), weights(whole))
    assert np.isfinite(weights(whole).numpy()).all()
