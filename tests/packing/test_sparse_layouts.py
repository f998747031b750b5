"""What the docstrings of the layouts say lies where."""

import numpy as np
import pytest
import torch
from sparse_samples import scales, sparse

from tcompress.packing import pack_sparse


def test_unstructured():
    dense = torch.tensor([[0.0, 3.0, 0.0], [5.0, 0.0, -1.0]])
    stored = pack_sparse(dense, "unstructured")
    assert stored.values.tolist() == [3, 5, -1]
    assert (stored.index.tolist(), stored.index_kind) == ([0b101010], "bitmap")


def test_four_bits():
    dense = torch.tensor([[0, -8, 0], [7, 0, 1]], dtype=torch.int8)
    stored = pack_sparse(dense, "unstructured", bits=4, group_size=3, scale=scales(2, 3, 4, 3))
    assert stored.values.tolist() == [0xF0, 0x09]


@pytest.mark.parametrize(("n", "k", "r", "c"), [(17, 9, 8, 4), (5, 7, 1, 4), (16, 32, 16, 16), (3, 3, 5, 2)])
def test_blocks(n, k, r, c):
    dense = sparse(n, k, f"{r}x{c}", 0.5, seed=3)
    stored = pack_sparse(dense, f"{r}x{c}")
    padded = np.zeros((-(-n // r) * r, -(-k // c) * c), dtype=np.float32)
    padded[:n, :k] = dense.numpy()
    blocks, kept = [], []
    for row in range(0, n, r):
        for column in range(0, k, c):
            block = padded[row : row + r, column : column + c]
            kept.append(bool(block.any()))
            blocks += [block] if kept[-1] else []
    assert np.array_equal(stored.values.numpy(), np.array(blocks, dtype=np.float32).ravel())
    assert stored.index_kind == "bitmap"
    assert np.array_equal(stored.index.numpy(), np.packbits(kept, bitorder="little"))


def test_a_block_with_one_value_is_kept_whole():
    dense = torch.zeros(16, 8)
    dense[15, 7] = 1.0
    assert pack_sparse(dense, "8x4").values.tolist() == [0.0] * 31 + [1.0]


@pytest.mark.parametrize(("n", "m", "k"), [(2, 4, 16), (2, 4, 7), (1, 3, 10), (5, 8, 17), (1, 2, 5), (3, 64, 65)])
def test_n_m(n, m, k):
    rows, width = 3, (m - 1).bit_length()
    dense = sparse(rows, k, f"{n}:{m}", 1, seed=5)
    dense[1] = 0
    stored = pack_sparse(dense, f"{n}:{m}")
    values, bits = [], []
    for row in dense.tolist():
        for start in range(0, k, m):
            group = (row[start : start + m] + [0.0] * m)[:m]
            kept = [i for i in range(m) if group[i] != 0]
            kept = sorted(kept + [i for i in range(m) if group[i] == 0][: n - len(kept)])
            values += [group[i] for i in kept]
            bits += [i >> bit & 1 for i in kept for bit in range(width)]
    assert stored.values.tolist() == values
    assert stored.index_kind == "positions"
    assert np.array_equal(stored.index.numpy(), np.packbits(bits, bitorder="little"))


def test_two_of_four_by_hand():
    dense = torch.tensor([[0.0, 5.0, 0.0, 6.0, 7.0, 0.0, 0.0, 0.0]])
    stored = pack_sparse(dense, "2:4")
    assert stored.values.tolist() == [5, 6, 7, 0]
    assert stored.index.tolist() == [0b01_00_11_01]


def test_n_m_must_hold():
    dense = torch.tensor([[1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0, float("nan")]])
    with pytest.raises(ValueError, match="pack_sparse: dense: got 1 groups of 4 with more than 2 values"):
        pack_sparse(dense, "2:4")
    assert torch.equal(pack_sparse(dense, "3:4").floats().isnan(), dense.isnan())


def damaged_positions(pattern, positions, width):
    stored = pack_sparse(torch.zeros(1, 8), pattern)
    stored.index[:] = torch.from_numpy(
        np.packbits([p >> b & 1 for p in positions for b in range(width)], bitorder="little")
    )
    return stored


@pytest.mark.parametrize(
    ("pattern", "positions", "width"),
    [
        ("2:4", [0, 1, 2, 2], 2),  # one position twice
        ("2:4", [1, 0, 0, 1], 2),  # not ascending
        ("2:6", [0, 1, 5, 6], 3),  # no such position
    ],
)
def test_malformed_positions(pattern, positions, width):
    with pytest.raises(ValueError, match="SparseWeight: index: got .*, expected 2 ascending positions below"):
        damaged_positions(pattern, positions, width).floats()


def test_padding_of_positions():
    stored = damaged_positions("2:6", [0, 1, 4, 5], 3)
    assert torch.equal(stored.floats(), torch.zeros(1, 8))
    stored.index[-1] |= 0x80
    with pytest.raises(ValueError, match="decode_index: index: got a bit set after the first 12"):
        stored.floats()
