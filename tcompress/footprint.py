"""What running a model takes: measured on one sample, once, by the tensors that live meanwhile."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from tcompress.calibrate import run
from tcompress.collect import InputCollector
from tcompress.live_tensors import LiveTensors
from tcompress.memory import nbytes_of, trim


@dataclass(frozen=True)
class Footprint:
    """Of one sample.

    Attributes:
        whole: bytes that live at most while the whole model runs, logits included.
        block: the most that one block and what is before the blocks take.
        outputs: what one block of each chain returns.
        calls: the most that one block is called with.
        groups: layers that are given one input.
        seconds: of the whole model, with statistics without Hessians.
        blocks_seconds: of that, in blocks.
        rows: of each group's input, how many tokens.
    """

    whole: int
    block: int
    outputs: tuple[int, ...]
    calls: int
    groups: tuple[tuple[nn.Module, ...], ...]
    seconds: float
    blocks_seconds: float
    rows: tuple[int, ...]

    def scaled(self, factor: float) -> Footprint:
        """Of a sample so many times as large."""
        return Footprint(
            int(self.whole * factor),
            int(self.block * factor),
            tuple(int(size * factor) for size in self.outputs),
            int(self.calls * factor),
            self.groups,
            self.seconds * factor,
            self.blocks_seconds * factor,
            tuple(int(rows * factor) for rows in self.rows),
        )


def measure(model: nn.Module, chains: Sequence[Sequence[nn.Module]], sample: Any, layers: list[nn.Module]) -> Footprint:
    """Runs the model once.

    Args:
        model: in evaluation mode, without gradients (`calibrate.evaluating`).
        chains: of `blocks.find_chains`.
        layers: whose inputs are wanted.
    """
    live = LiveTensors()
    outputs, calls, inside = [0] * len(chains), [0], [0]
    blocks_seconds, whole, before, started = 0.0, 0, 0, 0.0
    collector = InputCollector(layers, hessian=False)
    with ExitStack() as stack:
        for number, chain in enumerate(chains):
            for block in chain:

                def enter(module: nn.Module, args: Any, kwargs: Any, first: bool = block is chain[0]) -> None:
                    nonlocal whole, before, started
                    whole, before, started = max(whole, live.peak), 0 if first else live.now, time.perf_counter()
                    live.peak = live.now
                    calls[0] = max(calls[0], nbytes_of((args, kwargs)))

                def leave(module: nn.Module, args: Any, output: Any, number: int = number) -> None:
                    nonlocal blocks_seconds
                    blocks_seconds += time.perf_counter() - started
                    # A block that runs alone has no others' outputs and caches beside it.
                    inside[0] = max(inside[0], live.peak - before)
                    outputs[number] = max(outputs[number], nbytes_of(output))

                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave).remove)
        trim()
        stack.enter_context(live)
        start = time.perf_counter()
        collector.run(lambda: run(model, sample))
        seconds = time.perf_counter() - start
    whole = max(whole, live.peak)
    trim()
    groups = collector.groups()
    rows = [collector.rows_of(group[0]) for group in groups]
    # Beside a block's own run: what the one before returned, and the copy that is handed to it.
    alone = inside[0] + 2 * max(outputs) if chains else whole
    return Footprint(
        whole, alone, tuple(outputs), calls[0], tuple(map(tuple, groups)), seconds, blocks_seconds, tuple(rows)
    )
