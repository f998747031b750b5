import pytest
import torch
from sparse_samples import scales, sparse

from tcompress.packing import find_patterns, pack_sparse

BLOCKS = ["1x4", "8x4", "16x16", "32x32"]


def by_name(weight):
    return {fit.pattern: fit for fit in find_patterns(weight)}


@pytest.mark.parametrize("shape", [(0, 0), (0, 4), (3, 0), (1, 1), (33, 37), (64, 128)])
@pytest.mark.parametrize("made", ["unstructured", "2:4", *BLOCKS])
def test_it_tells_what_packing_stores(shape, made):
    for dtype, bits in ((torch.float32, 32), (torch.bfloat16, 16), (torch.int8, 8), (torch.int8, 4)):
        weight = sparse(*shape, made, 0.3, dtype, bits=min(bits, 8))
        fits = by_name(weight)
        assert made in fits
        assert [name for name in fits if name != "2:4"] == ["unstructured", *BLOCKS]
        for pattern, fit in fits.items():
            size = 16 if bits == 4 else 0
            scale = None if bits > 8 else scales(*shape, bits, size)
            stored = pack_sparse(weight, pattern, scale=scale, bits=bits, group_size=size)
            assert fit.nbytes(bits) == stored.values.nbytes + stored.index.nbytes
            if bits > 4:
                assert fit.values == stored.values.numel()
            assert fit.index_bytes == stored.index.nbytes
            assert fit.density == fit.values / max(weight.numel(), 1)


def test_fractions_by_hand():
    weight = torch.zeros(32, 64)
    weight[0, 0] = weight[9, 5] = float("nan")
    weight[:, 40] = -0.0
    fits = by_name(weight)
    kept = {name: (fit.kept_fraction, fit.values) for name, fit in fits.items()}
    assert kept == {
        "unstructured": (2 / 2048, 2),
        "2:4": (0.5, 1024),
        "1x4": (2 / 512, 8),
        "8x4": (2 / 64, 64),
        "16x16": (1 / 8, 256),
        "32x32": (1 / 2, 1024),
    }
    assert fits["8x4"].density == 64 / 2048
    assert fits["8x4"].nbytes(32) == 4 * 64 + 2


def test_two_of_four_must_hold_everywhere():
    weight = sparse(16, 30, "2:4", 1)
    assert "2:4" in by_name(weight)
    weight[15, 27:30] = 1.0
    weight[15, 24:28] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert "2:4" not in by_name(weight)


def test_a_dense_weight_says_so():
    for name, fit in by_name(torch.ones(32, 32)).items():
        assert name != "2:4"
        assert (fit.kept_fraction, fit.density) == (1, 1)


def test_not_a_matrix():
    with pytest.raises(ValueError, match=r"find_patterns: weight: got \[4\], expected \[N, K\]"):
        find_patterns(torch.ones(4))
