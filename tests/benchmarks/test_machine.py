"""What the benchmarks ask of the machine: whether it is idle, its clock, its memory."""

from __future__ import annotations

import clock
import idle
import pytest
from bandwidth import read_bandwidth

STAT = "cpu  300 10 90 500 60 0 20 20 50 5\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 5\n"


def test_proc_stat_is_parsed():
    times = idle.parse(STAT)
    assert times == idle.CpuTimes(busy=4.4, total=10.0)
    with pytest.raises(ValueError, match="expected /proc/stat"):
        idle.parse("MemTotal: 5 kB\n")


def test_others_are_told_from_us():
    before, after = idle.CpuTimes(10.0, 100.0), idle.CpuTimes(16.0, 120.0)
    assert idle.others(before, after) == pytest.approx(0.3)
    assert idle.others(before, after, own_seconds=5.0) == pytest.approx(0.05)
    assert idle.others(before, after, own_seconds=7.0) == 0.0
    assert idle.others(before, before) == 0.0


def test_waiting_ends(monkeypatch: pytest.MonkeyPatch):
    times = iter([idle.CpuTimes(i * 0.9, i) for i in range(100)])
    monkeypatch.setattr(idle, "now", lambda: next(times))
    assert not idle.wait(patience=0.02, sample=0.005)
    monkeypatch.setattr(idle, "now", lambda: idle.CpuTimes(0.0, 1.0))
    assert idle.wait(patience=30.0, sample=0.001)


def test_this_machine_has_the_file():
    times = idle.now()
    assert 0 < times.busy < times.total
    assert idle.own_seconds() > 0


@pytest.mark.skipif(not clock.supported(), reason="x86-64 with g++ only")
def test_clock():
    ghz = clock.measure(threads=1)
    assert ghz is not None
    assert 0.5 < ghz < 7


def test_bandwidth():
    assert 0.1 < read_bandwidth(1 << 24, repeats=3) < 5000
