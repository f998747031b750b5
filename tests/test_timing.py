"""Alternating measurement."""

from __future__ import annotations

import time

from tcompress.timing import alternate


def test_calls_in_turn_and_orders_by_speed():
    calls: list[str] = []

    def work(name: str, seconds: float):
        def run() -> None:
            calls.append(name)
            time.sleep(seconds)

        return run

    fast, slow = alternate([work("a", 0.001), work("b", 0.01)], seconds=0.1, warm_up=1)
    assert calls[:2] == ["a", "b"]
    measured = calls[2:]
    assert measured == ["a", "b"] * (len(measured) // 2)
    assert fast.calls == slow.calls == len(measured) // 2
    assert 0.001 <= fast.median < slow.median
    assert slow.median >= 0.01
    assert slow.quartiles[0] <= slow.median <= slow.quartiles[1]


def test_slow_functions_get_the_least_number_of_calls():
    (timing,) = alternate([lambda: time.sleep(0.02)], seconds=0.0, min_calls=4)
    assert timing.calls == 4
