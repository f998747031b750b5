"""Bytes that are alive, counted against sizes that are known."""

import torch

from tcompress.live_tensors import LiveTensors


def test_storages_count_from_their_first_to_their_last_use():
    with LiveTensors() as live:
        a = torch.zeros(100, 100)
        view = a.t()[3:]
        assert live.now == 40_000
        del a
        assert live.now == 40_000
        del view
        assert (live.now, live.peak) == (0, 40_000)
        b = torch.zeros(10) + 1
        assert (live.now, live.peak) == (40, 40_000)
        live.peak = live.now
        b.add_(1)
    assert live.peak == 40


def test_what_was_there_before_counts_only_where_it_is_asked_for():
    there = torch.zeros(100)
    with torch.no_grad():
        with LiveTensors() as live:
            view = there.view(10, 10)
            assert live.now == 0
            view.add_(1)
            assert live.peak == 0
            del view
        with LiveTensors([there]) as live:
            product = there * 2
            assert live.now == 800
            del there, product
            assert (live.now, live.peak) == (0, 800)


def test_lists_and_layers():
    layer = torch.nn.Linear(8, 4)
    with torch.no_grad(), LiveTensors() as live:
        parts = torch.zeros(6).split(2)
        assert live.now == 24
        del parts
        output = layer(torch.ones(3, 8))
        assert live.now == output.nbytes == 48
