"""Layout of the int8 key-value cache."""

import pytest
import torch

from tcompress.packing import kv_cache as layout

SHAPES = [(0, 8, 16), (1, 1, 1), (15, 3, 15), (64, 64, 64), (65, 18, 17), (130, 256, 80), (7, 0, 0)]


@pytest.mark.parametrize(("s", "d", "dv"), SHAPES)
def test_round_trip(s, d, dv):
    g = torch.Generator().manual_seed(s)
    k = torch.randint(-128, 128, (2, 3, s, d), dtype=torch.int8, generator=g)
    v = torch.randint(-128, 128, (2, 3, s, dv), dtype=torch.int8, generator=g)
    keys, values = layout.pack_keys(k), layout.pack_values(v)
    blocks = -(-s // layout.BLOCK)
    assert keys.shape == (2, 3, blocks, layout.key_bytes(d))
    assert values.shape == (2, 3, blocks, layout.value_bytes(dv))
    assert torch.equal(layout.unpack_keys(keys, s, d), k)
    assert torch.equal(layout.unpack_values(values, s, dv), v)
    # The first tokens alone, and nothing but zeros beside the numbers.
    assert torch.equal(layout.unpack_keys(keys, s // 2, d), k[:, :, : s // 2])
    assert keys.long().abs().sum() == k.long().abs().sum()
    assert values.long().abs().sum() == v.long().abs().sum()


def test_the_drawing():
    """Where the docstring says that a number lies."""
    s, d, dv = 70, 10, 20
    k = torch.arange(s)[:, None] % 11 + torch.arange(d)[None] * 11
    v = torch.arange(s)[:, None] % 6 + torch.arange(dv)[None] * 6
    keys = layout.pack_keys(k.to(torch.int8)).view(2, 4, 3, 16, 4)
    values = layout.pack_values(v.to(torch.int8)).view(2, 2, 16, 16, 4)
    for token, channel in ((0, 0), (17, 5), (63, 9), (64, 3), (69, 8)):
        at = keys[token // 64, token % 64 // 16, channel // 4, token % 16, channel % 4]
        assert at == k[token, channel]
    for token, channel in ((0, 0), (17, 5), (63, 19), (64, 16), (69, 8)):
        assert values[token // 64, channel // 16, token % 64 // 4, channel % 16, token % 4] == v[token, channel]
