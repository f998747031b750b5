import math

import pytest
import torch

from tcompress.nn.positional_encoding import PositionalEncoding


def encoding_by_hand(length, d_model):
    """Straight from the formula, in Python floats (float64)."""
    table = torch.empty(length, d_model, dtype=torch.float64)
    for pos in range(length):
        for channel in range(d_model):
            angle = pos / 10000 ** ((channel // 2 * 2) / d_model)
            table[pos, channel] = math.cos(angle) if channel % 2 else math.sin(angle)
    return table


@pytest.mark.parametrize("d_model", [1, 2, 3, 8, 13])
def test_formula(d_model):
    module = PositionalEncoding(d_model, max_len=40)
    y = module(torch.zeros(1, 40, d_model))
    # The only error allowed in float32 is the rounding of the float64 value.
    torch.testing.assert_close(y[0], encoding_by_hand(40, d_model).float(), rtol=0, atol=2**-24)


def test_far_positions_keep_float32_accuracy():
    """Angles computed in float32 would be off by 1e-4 here."""
    y = PositionalEncoding(6)(torch.zeros(1, 5000, 6))
    angle = 4999 / 10000 ** (2 / 6)
    expected = torch.tensor([math.sin(4999), math.cos(4999), math.sin(angle), math.cos(angle)])
    torch.testing.assert_close(y[0, -1, :4], expected, rtol=0, atol=2**-24)


def test_is_added_to_every_sequence():
    torch.manual_seed(0)
    x = torch.randn(3, 5, 8)
    expected = x.double() + encoding_by_hand(5, 8)
    torch.testing.assert_close(PositionalEncoding(8)(x).double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_follows_the_dtype_of_x(dtype):
    y = PositionalEncoding(8, max_len=10)(torch.zeros(2, 10, 8, dtype=dtype))
    assert y.dtype == dtype
    torch.testing.assert_close(y[1], encoding_by_hand(10, 8).to(dtype))


@pytest.mark.parametrize("table_dtype", [torch.float16, torch.float32, torch.float64])
def test_float64_x_gets_a_float64_signal(table_dtype):
    module = PositionalEncoding(7, max_len=10, dtype=table_dtype)
    y = module(torch.zeros(1, 10, 7, dtype=torch.float64))
    torch.testing.assert_close(y[0], encoding_by_hand(10, 7), rtol=0, atol=1e-14)


def test_narrow_table_does_not_limit_a_wider_x():
    y = PositionalEncoding(8, max_len=10).half()(torch.zeros(1, 10, 8))
    torch.testing.assert_close(y[0], encoding_by_hand(10, 8).float(), rtol=0, atol=2**-24)


def test_length_limit():
    module = PositionalEncoding(4, max_len=6)
    assert module(torch.zeros(1, 6, 4)).shape == (1, 6, 4)
    assert module(torch.zeros(1, 0, 4)).shape == (1, 0, 4)
    with pytest.raises(ValueError, match="x: got 7 tokens, expected at most max_len=6"):
        module(torch.zeros(1, 7, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fullgraph(dtype):
    module = PositionalEncoding(7, max_len=10)
    x = torch.randn(2, 5, 7, dtype=dtype)
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_state_dict_is_empty():
    assert not PositionalEncoding(4).state_dict()


def test_rejects_bad_arguments():
    with pytest.raises(ValueError, match="PositionalEncoding: d_model: got 0"):
        PositionalEncoding(0)
    with pytest.raises(ValueError, match="PositionalEncoding: max_len: got 0"):
        PositionalEncoding(4, max_len=0)
    for shape in [(5, 4), (1, 5, 3), (1, 1, 5, 4)]:
        with pytest.raises(ValueError, match=r"expected \[B, S, 4\]"):
            PositionalEncoding(4)(torch.zeros(shape))
    with pytest.raises(TypeError, match=r"got torch\.int64, expected a floating dtype"):
        PositionalEncoding(4)(torch.zeros(1, 5, 4, dtype=torch.int64))
