"""Quantization: what is computed (`scheme`) and how the integers are found (one algorithm a file)."""

from tcompress.quantize.gptq import gptq
from tcompress.quantize.hqq import hqq
from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import SCHEMES, PerChannel, PerGroup, PerTensor, PerToken, QuantArgs, Scheme

__all__ = [
    "SCHEMES",
    "PerChannel",
    "PerGroup",
    "PerTensor",
    "PerToken",
    "QuantArgs",
    "Scheme",
    "gptq",
    "hqq",
    "round_to_nearest",
]
