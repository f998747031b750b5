"""What steps that train a model will take, before they do."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from tcompress.calibrate import run
from tcompress.distill.learned_integers import LearnedIntegers
from tcompress.layer_job import Job
from tcompress.live_tensors import LiveTensors
from tcompress.memory import nbytes_of, trim
from tcompress.quantize import round_to_nearest
from tcompress.recipe import Distill, Finetune, Recipe
from tcompress.recipe.learning import Learning
from tcompress.report.size import model_sizes
from tcompress.weights import linear_weight

#: A batch costs the teacher a forward pass, and the student one and a backward pass, which is as long as two.
PASSES = 4
#: Bytes of a float32 parameter's gradient and of AdamW's two means.
_OPTIMIZER = 12
#: Bytes beside these that each integer in training has: itself, how far it moved (float32), and what a step keeps for
#: its gradient: integers and scales as float32 (three times, in and out of the grid), which of them are on the grid.
_INTEGER = 1 + 4 + 3 * 4 + 1


def learning_steps(recipe: Recipe) -> list[Learning]:
    """The steps of a recipe that train."""
    return [step for step in recipe.steps if isinstance(step, Distill | Finetune)]


def training_seconds(
    model: nn.Module, steps: list[Learning], jobs: list[Job], first: float, samples: list[Any]
) -> float:
    """Of all steps: passes of the model on each batch, and what is done to each weight, measured on one layer.

    Args:
        first: seconds of the model on the first sample.
    """
    sizes = [nbytes_of(sample) for sample in samples]
    mean = first * sum(sizes) / len(sizes) / max(sizes[0], 1)
    total = 0.0
    for step in steps:
        weight = _step_seconds(jobs, step) * (
            sum(linear_weight(job.module).numel() for job in jobs)
            if isinstance(step, Finetune)
            else sum(p.numel() for p in model.parameters())
        )
        total += step.steps * step.accumulate * (PASSES * mean + weight)
    return total


def _step_seconds(jobs: list[Job], step: Learning) -> float:
    """A weight's share in a step: what is made of it, its gradient, and AdamW."""
    trained = [job for job in jobs if job.args is not None]
    if not trained:
        return 0.0
    largest = max(trained, key=lambda job: linear_weight(job.module).numel())
    weight = linear_weight(largest.module).detach().float()
    assert largest.args is not None
    with torch.enable_grad():
        if isinstance(step, Finetune):
            packed = round_to_nearest(weight, largest.args)
            learned = LearnedIntegers({"": largest.module}, {"": packed}, {"": largest.args}, {}, step.integer_rate)
            (make,), parameters = learned.maps().values(), list(learned.parameters())
        else:
            make, parameters = torch.clone, [nn.Parameter(weight.clone())]
        optimizer = torch.optim.AdamW(parameters, lr=1e-9)
        seconds = 0.0
        for _ in range(2):  # the first makes AdamW's means
            start = time.perf_counter()
            make(parameters[0] if make is torch.clone else weight).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
    return seconds / max(weight.numel(), 1)


def training_memory(model: nn.Module, steps: list[Learning], jobs: list[Job], samples: list[Any]) -> tuple[int, int]:
    """Bytes beside the original model: of a student with its optimizer, and of the largest sample on its way."""
    if not steps or not samples:
        return 0, 0
    largest = max(range(len(samples)), key=lambda i: nbytes_of(samples[i]))
    trim()
    with torch.enable_grad(), LiveTensors() as live:
        output = run(model, samples[largest])
        kept = live.now
        del output
    student, weights = model_sizes(model).resident, sum(linear_weight(job.module).numel() for job in jobs)
    parameters = sum(p.numel() for p in model.parameters())
    learned = [
        weights * (_OPTIMIZER + _INTEGER) if isinstance(step, Finetune) else parameters * _OPTIMIZER for step in steps
    ]
    return student + max(learned), kept
