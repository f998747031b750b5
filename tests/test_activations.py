"""Nested values that are kept in memory or in files, and are the reader's own."""

import pytest
import torch

from tcompress.activations import Kept


class Cache:
    def __init__(self, keys):
        self.keys = keys


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_read_is_what_was_kept(tmp_path, on_disk):
    kept = Kept(tmp_path if on_disk else None, "block")
    table = torch.arange(10_000.0)
    kept[0] = (table[10:20], {"mask": torch.tensor([True, False]), "n": 3}, [None, Cache(table[:2].clone())])
    kept[1] = torch.ones(2, dtype=torch.bfloat16)
    assert len(kept) == 2
    for _ in range(2):
        tensor, mapping, (nothing, cache) = kept[0]
        assert torch.equal(tensor, table[10:20])
        assert mapping["mask"].tolist() == [True, False]
        assert (mapping["n"], nothing) == (3, None)
        assert torch.equal(cache.keys, table[:2])
        tensor.zero_()  # the reader's own
        cache.keys.zero_()
    assert kept[1].dtype == torch.bfloat16
    kept[1] = torch.zeros(1)
    assert kept[1].tolist() == [0.0]
    assert kept[7] is None
    files = sorted(tmp_path.iterdir())
    assert len(files) == (2 if on_disk else 0)
    assert all(file.stat().st_size < 9000 for file in files)  # not the whole table
