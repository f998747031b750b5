"""The index against numpy's bits and a loop over gaps."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tcompress.packing import decode_index, encode_index


def mask_of(positions, length):
    mask = torch.zeros(length, dtype=torch.bool)
    mask[list(positions)] = True
    return mask


def gap_bytes(mask):
    """The docstring's "delta", byte by byte."""
    out, gap = [], 0
    for kept in mask.tolist():
        if kept:
            out += [255] * (gap // 255) + [gap % 255]
            gap = 0
        else:
            gap += 1
    return out


def check(mask):
    index, kind = encode_index(mask)
    bitmap, delta = np.packbits(mask.numpy(), bitorder="little").tolist(), gap_bytes(mask)
    assert kind == ("delta" if len(delta) < len(bitmap) else "bitmap")
    assert index.tolist() == (delta if kind == "delta" else bitmap)
    assert (index.dtype, index.dim()) == (torch.uint8, 1)
    assert torch.equal(decode_index(index, kind, len(mask)), mask)
    return index, kind


def test_the_examples_of_the_docstring():
    index, kind = check(mask_of([600, 856], 5000))
    assert (index.tolist(), kind) == ([255, 255, 90, 255, 0], "delta")
    index, kind = check(mask_of([0, 2, 9], 11))
    assert (index.tolist(), kind) == ([5, 2], "bitmap")


@pytest.mark.parametrize("gap", [0, 1, 253, 254, 255, 256, 509, 510, 511, 1000])
@pytest.mark.parametrize("after", [0, 1, 300])
def test_gaps(gap, after):
    check(mask_of([gap], gap + 1 + after))
    check(mask_of([gap, 2 * gap + 1], 2 * gap + 2 + after))
    # As a delta for certain: few are kept.
    assert check(mask_of([gap, 2 * gap + 1], 4000))[1] == "delta"


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 255, 256, 2041])
def test_nothing_and_everything(length):
    index, kind = check(torch.zeros(length, dtype=torch.bool))
    assert (index.numel(), kind) == (0, "delta" if length else "bitmap")
    if length != 1:
        assert check(torch.ones(length, dtype=torch.bool))[1] == "bitmap"


def test_equal_lengths_take_the_bitmap():
    assert check(mask_of([0, 1], 16))[1] == "bitmap"
    assert check(mask_of([0, 1], 17))[1] == "delta"
    # 39 gaps, one of them in two bytes, against 320 bits.
    assert check(mask_of([*range(38), 37 + 256], 320))[1] == "bitmap"
    assert check(mask_of([*range(38), 37 + 255], 320))[1] == "delta"


@given(length=st.integers(0, 3000), kept=st.floats(0, 0.3), seed=st.integers(0, 2**31))
def test_any_mask(length, kept, seed):
    check(torch.rand(length, generator=torch.Generator().manual_seed(seed)) < kept)


@given(index=st.lists(st.integers(0, 255), max_size=40), kind=st.sampled_from(["bitmap", "delta"]), data=st.data())
def test_any_bytes_decode_or_raise(index, kind, data):
    length = data.draw(st.integers(0, 8 * len(index)) if kind == "bitmap" else st.integers(0, 4000))
    stored = torch.tensor(index, dtype=torch.uint8)
    try:
        mask = decode_index(stored, kind, length)
    except ValueError:
        return
    assert (mask.dtype, mask.shape) == (torch.bool, (length,))
    again = gap_bytes(mask) if kind == "delta" else np.packbits(mask.numpy(), bitorder="little").tolist()
    assert again == index  # there is one way to write a mask in a kind


def test_strides():
    index, kind = encode_index(mask_of([3, 8], 12))
    spread = torch.stack([index, index], 1)[:, 0]
    assert torch.equal(decode_index(spread, kind, 12), mask_of([3, 8], 12))
    mask = mask_of([3, 8, 40], 90)
    assert torch.equal(encode_index(mask[::2])[0], encode_index(mask[::2].clone())[0])


U8 = torch.uint8


@pytest.mark.parametrize(
    ("index", "kind", "length", "error", "text"),
    [
        (torch.zeros(1, dtype=U8), "gaps", 8, ValueError, "kind: got 'gaps', expected"),
        (torch.zeros(1, dtype=torch.int8), "bitmap", 8, TypeError, "index: got torch.int8, expected uint8"),
        (torch.zeros(1, 1, dtype=U8), "bitmap", 8, ValueError, "index: got [1, 1], expected one dimension"),
        (torch.zeros(2, dtype=U8), "bitmap", 8, ValueError, "index: got 2 bytes, expected 1"),
        (torch.zeros(1, dtype=U8), "bitmap", 9, ValueError, "index: got 1 bytes, expected 2"),
        (torch.tensor([8], dtype=U8), "bitmap", 3, ValueError, "index: got a bit set after the first 3"),
        (torch.tensor([1, 255], dtype=U8), "delta", 999, ValueError, "index: got a gap that goes on"),
        (torch.tensor([1, 3], dtype=U8), "delta", 5, ValueError, "index: got position 5, expected less than 5"),
        (torch.tensor([0], dtype=U8), "delta", 0, ValueError, "index: got position 0, expected less than 0"),
    ],
)
def test_malformed(index, kind, length, error, text):
    with pytest.raises(error) as raised:
        decode_index(index, kind, length)
    assert str(raised.value).startswith("decode_index: " + text)


def test_what_is_no_mask():
    with pytest.raises(TypeError, match="encode_index: mask: got torch.uint8, expected bool"):
        encode_index(torch.zeros(3, dtype=U8))
    with pytest.raises(ValueError, match=r"encode_index: mask: got \[3, 2\], expected \[length\]"):
        encode_index(torch.zeros(3, 2, dtype=torch.bool))
