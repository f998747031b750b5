"""The loop that trains: accelerate is the engine, and a run that was stopped goes on as if it had not been."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from tcompress.distill.batches import Batches
from tcompress.distill.constraint import Constraint
from tcompress.errors import message
from tcompress.recipe.training import Training

Evaluate = Callable[[], float | Mapping[str, float]]


@dataclass
class History:
    """What a training saw.

    Attributes:
        losses: of each step, each term as weighted and "total".
        metrics: (step, values) of each evaluation; step 0 is before training.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    metrics: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def check_accelerate(where: str) -> None:
    """Raises ImportError unless accelerate is installed."""
    try:
        import accelerate  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{where}: accelerate: got {error}, expected it; pip install tcompress[train]") from error


@contextmanager
def accelerator(device: torch.device, mixed_precision: str = "no") -> Iterator[Any]:
    """The engine for a model on this device; under `accelerate launch` one of several processes.

    Its settings are accelerate's for the whole process: those of a training around this one, or before it, are set
    aside meanwhile.

    Raises:
        ImportError: accelerate is not installed.
    """
    check_accelerate("distill")
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.state import AcceleratorState

    # A loss need not reach all of a model: that on blocks leaves the head without gradients.
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    before = dict(AcceleratorState._shared_state)
    AcceleratorState._shared_state.clear()
    try:
        engine = Accelerator(cpu=device.type == "cpu", mixed_precision=mixed_precision, kwargs_handlers=[unused])
        yield engine
        engine.free_memory()
    finally:
        AcceleratorState._shared_state.clear()
        AcceleratorState._shared_state.update(before)


def train(
    module: nn.Module,
    data: Any,
    options: Training,
    *,
    parameters: Sequence[nn.Parameter],
    constraints: Sequence[Constraint] = (),
    evaluate: Evaluate | None = None,
    checkpoint: str | Path | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> History:
    """Minimises the sum of the losses that a module gives, by AdamW.

    Args:
        module: `module(batch)` gives losses by name, scalars.
        data: as for `Batches`.
        parameters: which are trained, of the module; those of the constraints come along, with their own rate. Their
            gradients, not those that come along, are clipped.
        constraints: what holds for the weights; children of the module.
        evaluate: called before the first step, each `eval_every` steps and after the last one.
        checkpoint: a folder for checkpoints, each written whole or not at all; only the last is kept. One that a run
            with the same settings left there is taken up.
        fingerprint: further settings by which a checkpoint is known to be of this run.
        progress: whether to show progress on the terminal.

    Raises:
        ImportError: accelerate is not installed. ValueError: no parameters, a loss that is not finite, or a checkpoint
            of another run.
    """
    everything = [*parameters, *(p for constraint in constraints for p in constraint.parameters())]
    if not everything:
        raise ValueError(message("distill", "targets", "no parameters to train", "at least one"))
    with accelerator(everything[0].device, options.mixed_precision) as engine:
        run = _Run(module, engine, options, list(parameters), list(constraints))
        source = Batches(data, options.seed, engine.process_index, engine.num_processes)
        folder = None if checkpoint is None else Path(checkpoint)
        settings = json.loads(
            json.dumps({"training": options.model_dump(exclude={"eval_every", "save_every"}), **(fingerprint or {})})
        )
        return _trained(run, source, folder, settings, evaluate, progress)


def _trained(
    run: _Run,
    source: Batches,
    folder: Path | None,
    settings: dict[str, Any],
    evaluate: Evaluate | None,
    progress: bool,
) -> History:
    engine, options, history = run.engine, run.options, History()
    with _own_random_numbers(options.seed):
        start = 0 if folder is None else _resume(engine, folder, settings, history)
        stream = source.after(start * options.accumulate)
        with _bar(options.steps, start, progress and engine.is_main_process) as show:
            for step in range(start, options.steps):
                if step == 0 and evaluate is not None:
                    history.metrics.append((0, _named(evaluate())))
                losses = run.step(step, [next(stream) for _ in range(options.accumulate)])
                history.losses.append(losses)
                show(step + 1, losses["total"])
                last = step + 1 == options.steps
                if evaluate is not None and (last or (step + 1) % options.eval_every == 0):
                    history.metrics.append((step + 1, _named(evaluate())))
                if folder is not None and (last or (step + 1) % options.save_every == 0):
                    _save(engine, folder, settings, history)
    return history


class _Run:
    """One step after the other."""

    def __init__(
        self,
        module: nn.Module,
        engine: Any,
        options: Training,
        parameters: list[nn.Parameter],
        constraints: list[Constraint],
    ) -> None:
        self.engine, self.options, self.constraints = engine, options, constraints
        self.parameters = parameters
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.fixed_lr: list[float | None] = [None, None]
        given = {id(p) for p in parameters}
        for constraint in constraints:
            own = [p for p in constraint.parameters() if id(p) not in given]
            if own:
                groups.append({"params": own, "weight_decay": 0.0})
                self.fixed_lr.append(constraint.lr)
        optimizer = torch.optim.AdamW(groups, lr=options.lr)
        self.module, self.optimizer = engine.prepare(module, optimizer)

    def step(self, step: int, batches: list[Any]) -> dict[str, float]:
        from accelerate.utils import send_to_device

        for constraint in self.constraints:
            constraint.before_step(step)
        for group, fixed in zip(self.optimizer.param_groups, self.fixed_lr, strict=True):
            group["lr"] = self.options.lr_at(step) if fixed is None else fixed
        seen: dict[str, float] = {}
        for batch in batches:
            losses = self.module(send_to_device(batch, self.engine.device))
            total = torch.stack(list(losses.values())).sum() / len(batches)
            if not torch.isfinite(total):
                got = ", ".join(f"{name} {float(value.detach()):.4g}" for name, value in losses.items())
                hint = "look at the data, lower lr, or warm up for longer"
                raise ValueError(message("distill", "loss", f"{got} at step {step + 1}", "a finite one", hint))
            self.engine.backward(total)
            for name, value in [*losses.items(), ("total", total * len(batches))]:
                seen[name] = seen.get(name, 0.0) + float(value.detach()) / len(batches)
        for constraint in self.constraints:
            constraint.after_backward()
        if self.options.max_grad_norm is not None:
            self.engine.clip_grad_norm_(self.parameters, self.options.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        for constraint in self.constraints:
            constraint.after_step(step)
        return seen


_STATE = "training.json"


def _save(engine: Any, folder: Path, settings: dict[str, Any], history: History) -> None:
    """Writes beside the last checkpoint and then takes its place, so that one of the two is whole at any time."""
    step = len(history.losses)
    engine.wait_for_everyone()
    new, name = folder / "unfinished", f"step-{step:08d}"
    if engine.is_main_process:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
    engine.wait_for_everyone()
    engine.save_state(str(new))
    if engine.is_main_process:
        (new / _STATE).write_text(json.dumps({"settings": settings, "history": asdict(history)}))
        old = [path for path in folder.glob("step-*") if path.name != name]
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(new, folder / name)
        for path in old:
            shutil.rmtree(path)
    engine.wait_for_everyone()


def _resume(engine: Any, folder: Path, settings: dict[str, Any], history: History) -> int:
    """Loads the last checkpoint, and gives the number of steps that are done; 0 where there is none."""
    found = sorted(folder.glob("step-*"))
    if not found:
        return 0
    state = json.loads((found[-1] / _STATE).read_text())
    if state["settings"] != settings:
        other = sorted(k for k in settings | state["settings"] if settings.get(k) != state["settings"].get(k))
        hint = f"they differ in {', '.join(other)}; take another folder or delete it"
        raise ValueError(message("distill", "checkpoint", f"{folder}, of a run with other settings", "the same", hint))
    history.losses = state["history"]["losses"]
    history.metrics = [(step, values) for step, values in state["history"]["metrics"]]
    engine.load_state(str(found[-1]))
    return len(history.losses)


@contextmanager
def _own_random_numbers(seed: int) -> Iterator[None]:
    """Random numbers of the training's own; the caller's go on where they were."""
    python, arrays = random.getstate(), np.random.get_state()  # noqa: NPY002  what accelerate saves and loads
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed)  # noqa: NPY002
            yield
    finally:
        random.setstate(python)
        np.random.set_state(arrays)  # noqa: NPY002


@contextmanager
def _bar(steps: int, start: int, shown: bool) -> Iterator[Callable[[int, float], None]]:
    text = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*text, transient=True, disable=not shown) as bar:
        task = bar.add_task("training", total=steps, completed=start)
        yield lambda step, loss: bar.update(task, completed=step, description=f"training, loss {loss:.4g}")


def _named(metric: float | Mapping[str, float]) -> dict[str, float]:
    values = metric if isinstance(metric, Mapping) else {"metric": metric}
    named = {name: float(value) for name, value in values.items()}
    bad = [name for name, value in named.items() if math.isinf(value)]
    if bad:
        raise ValueError(message("distill", "evaluate", f"infinite {', '.join(bad)}", "numbers"))
    return named
