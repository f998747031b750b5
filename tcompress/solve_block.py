"""Solves the layers of a block together, by the block's output: what AutoRound does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcompress.activations import Kept, copied, tensors_in
from tcompress.blocks import forward_replaced
from tcompress.calibrate import first_tensor
from tcompress.layer_job import Job, Key, Solution
from tcompress.padding import Masks, counted, running_masks
from tcompress.quantize.autoround import RoundedWeight, autoround
from tcompress.quantize.gptq import gptq_grid
from tcompress.quantize.range_search import find_grid
from tcompress.solve_layer import pruned_weight
from tcompress.statistics import InputStatistics
from tcompress.weights import linear_bias


class Calls:
    """What a block was called with on all samples, to call it again.

    Args:
        folder: as for `activations.Kept`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._given = Kept(folder, f"calls-{id(self)}")
        self._masks: list[Masks] = []

    def __len__(self) -> int:
        return len(self._given)

    def hook(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """A forward pre-hook, registered with_kwargs."""
        self._given[len(self._given)] = copied(args), copied(kwargs)
        self._masks.append(running_masks())

    def output(self, block: nn.Module, call: int) -> torch.Tensor:
        """The first tensor that the block returns when it is called so again."""
        args, kwargs = self._given[call]
        output = first_tensor(block(*args, **kwargs))
        if output is None:
            raise ValueError(f"autoround: block: got {type(block).__name__}, expected one that returns a float tensor")
        return output

    def masks(self, call: int) -> Masks:
        """What of the tokens counted then."""
        return self._masks[call]


def solve_block(
    block: nn.Module,
    jobs: Sequence[Job],
    statistics: Mapping[Key, InputStatistics],
    calls: Calls,
    targets: Kept,
) -> tuple[dict[Key, Solution], float, float]:
    """Learns the rounding of a block's layers (`quantize.autoround`): mean squared error of the block's first output
    to that of the original block behind original blocks.

    Args:
        block: its other layers compute as they will.
        jobs: the layers that AutoRound solves.
        statistics: of layers that begin with GPTQ's solution, or whose pruning needs them.
        calls: of the compressed model.
        targets: what the original block returned, by call.

    Returns:
        Solutions by layer, and the mean loss at the beginning and at the end.

    Raises:
        ValueError: what the algorithm raises, with a layer's name.
    """
    by_key = {job.key: job for job in jobs}
    begins = {key: _begin(job, statistics.get(key)) for key, job in by_key.items()}
    keys = list(by_key)
    with ExitStack() as stack:
        for parameter in block.parameters():
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(False)
        current: dict[Key, torch.Tensor] = {}
        for job in jobs:
            stack.enter_context(forward_replaced(job.module, _by(current, job)))

        def loss(values: Sequence[torch.Tensor], call: int) -> torch.Tensor:
            current.update(zip(keys, values, strict=True))
            expected = next(t for t in tensors_in(targets[call]) if t.is_floating_point())
            output = calls.output(block, call)
            masks = calls.masks(call)
            return F.mse_loss(counted(output, masks).float(), counted(expected, masks).float())

        iterations = jobs[0].quantize.iterations if jobs[0].quantize is not None else None
        assert iterations is not None
        first, least = autoround([begins[key][0] for key in keys], loss, len(calls), iterations)
    solved = {}
    for key in keys:
        packed = begins[key][0].packed()
        solved[key] = Solution(packed.dequantize(), begins[key][1], packed)
    return solved, first, least


def _begin(job: Job, statistics: InputStatistics | None) -> tuple[RoundedWeight, torch.Tensor | None]:
    """Where a layer's learning begins, and what pruning keeps of it."""
    assert job.args is not None
    assert job.quantize is not None
    try:
        weight, mask = pruned_weight(job, statistics)
        if statistics is not None and statistics.count and job.quantize.start == "gptq":
            _, grid, wanted = gptq_grid(weight, statistics, job.args, range="mse")
            return RoundedWeight(weight.float(), grid, wanted), mask
        return RoundedWeight(weight.float(), find_grid(weight, job.args, "autoround", "mse")), mask
    except ValueError as error:
        raise ValueError(f"compress: {job.name}: {error}") from error


def _by(current: Mapping[Key, torch.Tensor], job: Job) -> Callable[[torch.Tensor], torch.Tensor]:
    def forward(input: torch.Tensor) -> torch.Tensor:
        return F.linear(input, current[job.key].to(input.dtype), linear_bias(job.module))

    return forward
