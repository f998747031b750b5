import dataclasses

import numpy as np
import pytest
import torch

from tcompress.packing import PackedWeight

QDATA = torch.tensor([[127, -127, 0], [1, -2, 3]], dtype=torch.int8)
SCALE = torch.tensor([0.5, 2.0**-10])


def packed(**changes):
    return PackedWeight(**{"qdata": QDATA, "scale": SCALE, "shape": (2, 3), **changes})


def test_fields():
    weight = packed()
    assert weight.qdata is QDATA
    assert weight.scale is SCALE
    assert weight.shape == (2, 3)
    assert weight.layout == "dense"


def test_dequantize():
    expected = torch.tensor([[63.5, -63.5, 0.0], [2.0**-10, -(2.0**-9), 3 * 2.0**-10]])
    assert packed().dequantize().dtype == torch.float32
    assert torch.equal(packed().dequantize(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dequantize_computes_in_float32_and_rounds_once(dtype):
    generator = torch.Generator().manual_seed(0)
    qdata = torch.randint(-127, 128, (20, 30), generator=generator, dtype=torch.int8)
    scale = torch.rand(20, generator=generator) + 0.01
    weight = packed(qdata=qdata, scale=scale, shape=(20, 30)).dequantize(dtype)
    exact = qdata.numpy().astype(np.float32) * scale.numpy()[:, None]
    assert weight.dtype == dtype
    assert torch.equal(weight, torch.from_numpy(exact).to(dtype))


def test_extremes_of_int8():
    qdata = torch.tensor([[-128, 127]], dtype=torch.int8)
    assert packed(qdata=qdata, scale=torch.ones(1), shape=(1, 2)).dequantize().tolist() == [[-128.0, 127.0]]


@pytest.mark.parametrize("shape", [(2, 3), (7, 5), (0, 4), (3, 0)])
def test_nbytes(shape):
    n, k = shape
    weight = packed(qdata=torch.zeros(shape, dtype=torch.int8), scale=torch.ones(n), shape=shape)
    assert weight.nbytes == n * k + 4 * n
    assert weight.dequantize().shape == shape


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        packed().scale = SCALE
