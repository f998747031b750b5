import pytest
import torch
from calibrated import statistics_of, weight

from tcompress.quantize import SCHEMES, round_to_nearest
from tcompress.quantize.bias_correction import corrected_bias
from tcompress.statistics import InputStatistics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mean_of_each_output_is_what_it_was(dtype):
    w, x = weight(12, 40), weight(300, 40, 3) + weight(1, 40, 4)
    bias = weight(1, 12, 5)[0].to(dtype)
    quantized = round_to_nearest(w, SCHEMES["W4A16"].weights).dequantize()
    statistics = InputStatistics(40, hessian=False)
    for part in x.split(7):
        statistics.add(part)
    got = corrected_bias(bias, w, quantized, statistics)
    assert got.dtype == dtype
    before = (x.double() @ w.double().T + bias.double()).mean(0)
    after = (x.double() @ quantized.double().T + got.double()).mean(0)
    uncorrected = (x.double() @ quantized.double().T + bias.double()).mean(0)
    assert float((after - before).abs().max()) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert float((uncorrected - before).abs().max()) > 0.1


def test_errors():
    with pytest.raises(ValueError, match="corrected_bias: statistics: got 5 features, expected 4"):
        corrected_bias(torch.ones(2), torch.ones(2, 4), torch.ones(2, 4), statistics_of(torch.ones(3, 5)))
    with pytest.raises(ValueError, match="corrected_bias: statistics: got no inputs"):
        corrected_bias(torch.ones(2), torch.ones(2, 4), torch.ones(2, 4), InputStatistics(4))
