"""Whether others use the processor: from /proc/stat, over all processors that it lists."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

#: More than this part of the processors in other hands makes a round noisy.
LIMIT = 0.10


@dataclass(frozen=True)
class CpuTimes:
    """Seconds since the machine started, summed over its processors. What a hypervisor took counts as busy."""

    busy: float
    total: float


def parse(text: str, ticks_per_second: int = 100) -> CpuTimes:
    """Reads the first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal; the rest is part
    of the first two."""
    name, *fields = text.splitlines()[0].split()
    if name != "cpu" or len(fields) < 4:
        raise ValueError(f"idle: text: got {text[:40]!r}, expected /proc/stat")
    ticks = [int(field) for field in fields[:8]]
    idle = sum(ticks[3:5])
    return CpuTimes((sum(ticks) - idle) / ticks_per_second, sum(ticks) / ticks_per_second)


def now() -> CpuTimes:
    return parse(Path("/proc/stat").read_text(), os.sysconf("SC_CLK_TCK"))


def others(before: CpuTimes, after: CpuTimes, own_seconds: float = 0.0) -> float:
    """The part of the processors, 0 … 1, that was busy between two samples with anything but `own_seconds` of work."""
    total = after.total - before.total
    return max(0.0, after.busy - before.busy - own_seconds) / total if total > 0 else 0.0


def own_seconds() -> float:
    """Processor time of this process and of those that it started and that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def wait(patience: float = 30.0, sample: float = 0.5) -> bool:
    """Waits until others leave the processors alone, `patience` seconds at most; samples are `sample` seconds long.

    Returns:
        Whether the machine is idle. The first sample is often enough, so an idle machine costs `sample` seconds.
    """
    end = time.monotonic() + patience
    while True:
        before = now()
        time.sleep(sample)
        if others(before, now()) <= LIMIT:
            return True
        if time.monotonic() >= end:
            return False
