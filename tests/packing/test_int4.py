import pytest
import torch

from tcompress.packing import pack_int4, unpack_int4


def random_integers(n, k):
    return torch.randint(16, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n * 100 + k))


def test_the_even_k_is_in_the_low_nibble():
    q = torch.tensor([[1, 2, 3], [15, 0, 8]], dtype=torch.uint8)
    assert pack_int4(q).tolist() == [[0x21, 0x03], [0x0F, 0x08]]


@pytest.mark.parametrize("n", [0, 1, 2, 17])
@pytest.mark.parametrize("k", [0, 1, 2, 3, 31, 32, 33])
def test_unpack_is_the_inverse_of_pack(n, k):
    q = random_integers(n, k)
    packed = pack_int4(q)
    assert (packed.dtype, packed.shape) == (torch.uint8, (n, (k + 1) // 2))
    assert torch.equal(unpack_int4(packed, k), q)
    if k % 2:
        assert not (packed[:, -1] >> 4).any()


def test_every_pair_of_nibbles():
    packed = torch.arange(256).to(torch.uint8)[None]
    assert torch.equal(pack_int4(unpack_int4(packed, 512)), packed)


def test_any_strides():
    q = random_integers(6, 9)
    assert torch.equal(pack_int4(q.t().contiguous().t()), pack_int4(q))
    assert torch.equal(pack_int4(q[::2, 1::3]), pack_int4(q[::2, 1::3].clone()))
    assert torch.equal(unpack_int4(pack_int4(q).t().contiguous().t(), 9), q)


@pytest.mark.parametrize(
    ("q", "error", "text"),
    [
        (torch.zeros(2, 2, dtype=torch.int8), TypeError, "pack_int4: q: got torch.int8, expected uint8"),
        (torch.zeros(2, 2), TypeError, "pack_int4: q: got torch.float32, expected uint8"),
        (torch.zeros(2, dtype=torch.uint8), ValueError, "pack_int4: q: got [2], expected [N, K]"),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), ValueError, "pack_int4: q: got [1, 2, 2], expected [N, K]"),
        (torch.tensor([[0, 16]], dtype=torch.uint8), ValueError, "pack_int4: q: got a value of 16, expected 0 to 15"),
        (torch.tensor([[255]], dtype=torch.uint8), ValueError, "pack_int4: q: got a value of 255, expected 0 to 15"),
    ],
)
def test_errors(q, error, text):
    with pytest.raises(error) as raised:
        pack_int4(q)
    assert str(raised.value).startswith(text)
