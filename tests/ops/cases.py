"""The one list of cases of the ops: shapes, inputs, layouts, schemes and CPU paths, by name.

Every test of a kernel takes its cases from here, so that a new kernel meets all of them. `SAMPLES` has small arguments
of each op for the tests that hold for any op (`opcheck`, `test_registry.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import attention_samples
import int4_sparse_cases
import sparse_cases
import static_cases
import torch

from tcompress import _C
from tcompress.packing.int4 import pack_int4

CPU_PATHS = tuple(path for path in _C.all_paths() if _C.why_not_usable(path) == "")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")

#: (bits, symmetric) of the activations: what `int8_linear` takes; `quantize_per_token` has 8 bits asymmetric too.
LINEAR_SCHEMES = tuple((bits, True) for bits in range(2, 9)) + tuple((bits, False) for bits in range(2, 8))
SCHEMES = (*LINEAR_SCHEMES, (8, False))
W8A8, W8A7 = (8, True), (7, False)


@dataclass(frozen=True)
class Shape:
    """`m` tokens, `n` outputs, `k` inputs."""

    name: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.name}-{self.m}x{self.n}x{self.k}"


# What the kernels cut a problem into: rows in tiles of 4 (scalar, AVX2 signed), 6 (AVX2), 8 (AVX-512), 16 and 32 (AMX,
# from 9 rows); outputs in panels of 16 and groups of 3 panels; k in fours, in 16s where a small AVX-512 tile splits its
# sums, in 64s (AMX), and in lanes of 8 and 16 where a row is quantized. Quantized rows go in blocks of 128 KiB; 2^18
# products are worth a thread.
SHAPES = (
    Shape("no-tokens", 0, 16, 8),
    Shape("no-outputs", 3, 0, 8),
    Shape("no-inputs", 3, 17, 0),
    Shape("nothing", 0, 0, 0),
    Shape("one", 1, 1, 1),
    Shape("one-token", 1, 33, 20),
    Shape("one-output", 9, 1, 24),
    Shape("one-input", 5, 18, 1),
    Shape("panel-less-1", 2, 15, 8),
    Shape("panel", 2, 16, 8),
    Shape("panel-and-1", 2, 17, 8),
    Shape("two-panels", 3, 32, 12),
    Shape("group-less-1", 8, 47, 16),
    Shape("group", 8, 48, 16),
    Shape("group-and-1", 8, 49, 16),
    Shape("group-and-panel", 7, 64, 16),
    Shape("group-and-two-panels", 6, 80, 28),
    Shape("two-groups-and-1", 4, 97, 36),
    Shape("quad-less-1", 3, 20, 3),
    Shape("quad", 3, 20, 4),
    Shape("quad-and-1", 3, 20, 5),
    Shape("lane8-less-1", 3, 20, 7),
    Shape("lane8-and-1", 3, 20, 9),
    Shape("lane16-less-1", 4, 23, 15),
    Shape("lane16", 4, 24, 16),
    Shape("lane16-and-1", 4, 25, 17),
    Shape("split-k-and-quad", 1, 16, 52),
    Shape("tile4-less-1", 3, 31, 33),
    Shape("tile4-and-1", 5, 32, 33),
    Shape("tile6-and-1", 7, 33, 31),
    Shape("tile8", 8, 50, 30),
    Shape("tile8-and-1", 9, 50, 30),
    Shape("tiles-4-6-8-and-1", 25, 51, 29),
    Shape("tile16-less-1", 15, 47, 63),
    Shape("tile16", 16, 48, 64),
    Shape("tile16-and-1", 17, 49, 65),
    Shape("tile32-less-1", 31, 80, 60),
    Shape("tile32", 32, 64, 128),
    Shape("tile32-and-1", 33, 97, 129),
    Shape("primes", 13, 37, 101),
    Shape("more-primes", 7, 61, 127),
    Shape("power-of-two", 6, 64, 1024),
    Shape("tall", 301, 17, 127),  # two threads share the rows
    Shape("wide", 1, 4099, 131),  # two threads share the panels
    Shape("rows-in-blocks", 150, 17, 2049),  # 128 KiB hold 56 to 60 rows of 2052 bytes
    Shape("longest", 2, 18, 65536),
)


def generator(name: object) -> torch.Generator:
    """The same numbers for the same name, on every run."""
    return torch.Generator().manual_seed(sum(ord(c) * 31**i for i, c in enumerate(str(name))) % 2**31)


def random_weight(n: int, k: int, name: object = "weight") -> torch.Tensor:
    return torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=generator(name))


def linear_operands(shape: Shape, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight, weight_scale and bias, of ordinary size."""
    g = generator(shape)
    x = torch.randn(shape.m, shape.k, generator=g).to(dtype)
    weight_scale = torch.rand(shape.n, generator=g) * 0.02 + 1e-4
    bias = torch.randn(shape.n, generator=g)
    return x, random_weight(shape.n, shape.k, shape), weight_scale, bias


# ---- inputs that are hard to quantize: (m, k, dtype) -> [m, k] ------------------------------------------------------


def _normal(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(m, k, generator=generator(f"{m} {k}")).to(dtype)


def _one_row(value: float) -> Callable[[int, int, torch.dtype], torch.Tensor]:
    """Ordinary rows, of which the middle one holds `value` once, in its last column."""

    def make(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
        x = _normal(m, k, dtype)
        x[m // 2, -1] = value
        return x

    return make


def _zero_rows(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    x = _normal(m, k, dtype)
    x[::2] = 0
    return x


def _negative_zeros(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((m, k), -0.0, dtype=dtype)


def _max_float(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    x = _normal(m, k, dtype)
    x[m // 2] = torch.finfo(dtype).max
    x[m // 2, ::2] = torch.finfo(dtype).min
    x[0, 0] = torch.finfo(dtype).min
    return x


def _magnitudes(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """From the smallest subnormal number up, so that most of a row rounds to 0."""
    exponent = torch.linspace(-149, 10, k).repeat(m, 1) + torch.arange(m)[:, None]
    return (torch.exp2(exponent) * (-1) ** torch.arange(k)).to(dtype)


def _halves(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """The largest magnitude is 127, so that the scale of 8 bits is 1, and every element is a tie."""
    x = ((torch.arange(m * k) % 126).reshape(m, k) + 0.5) * (-1) ** torch.arange(k)
    x[:, 0] = 127
    return x.to(dtype)


INPUTS: dict[str, Callable[[int, int, torch.dtype], torch.Tensor]] = {
    "normal": _normal,
    "negatives": lambda m, k, dtype: -_normal(m, k, dtype).abs() - 0.125,
    "positives": lambda m, k, dtype: _normal(m, k, dtype).abs() + 0.125,
    "zeros": lambda m, k, dtype: torch.zeros(m, k, dtype=dtype),
    "negative-zeros": _negative_zeros,
    "zero-rows": _zero_rows,
    "constant": lambda m, k, dtype: torch.full((m, k), 0.3, dtype=dtype),
    "negative-constant": lambda m, k, dtype: torch.full((m, k), -7.7, dtype=dtype),
    "outlier": _one_row(6e4),
    "negative-outlier": _one_row(-6e4),
    "1e-38": lambda m, k, dtype: (_normal(m, k, torch.float32) * 1e-38).to(dtype),
    "smallest-normal": lambda m, k, dtype: _normal(m, k, dtype).sign() * torch.finfo(dtype).tiny,
    "subnormal": lambda m, k, dtype: _normal(m, k, dtype) * (torch.finfo(dtype).tiny / 16),
    "max-float": _max_float,
    "magnitudes": _magnitudes,
    "halves": _halves,
    "nan": _one_row(float("nan")),
    "inf": _one_row(float("inf")),
    "negative-inf": _one_row(float("-inf")),
}

WEIGHTS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": random_weight,
    "small": lambda n, k: random_weight(n, k) // 12,  # AVX2 sums several steps of whole groups in 16 bits
    "all -128": lambda n, k: torch.full((n, k), -128, dtype=torch.int8),
    "all 127": lambda n, k: torch.full((n, k), 127, dtype=torch.int8),
    "-128 and 127": lambda n, k: (torch.arange(n * k).reshape(n, k) % 2 * 255 - 128).to(torch.int8),
    "zeros": lambda n, k: torch.zeros(n, k, dtype=torch.int8),
}

# ---- int4 weights ----------------------------------------------------------------------------------------------------

PER_CHANNEL = 65536  # at least K
GROUP_SIZES = (32, 64, 128, 256, 512, PER_CHANNEL)


@dataclass(frozen=True)
class Int4Weight:
    """One integer 0 … 15 an element in `q`, and the operands of `int4_linear` that it comes from."""

    q: torch.Tensor
    weight: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    group_size: int

    @property
    def operands(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.weight, self.scale, self.zero_point

    def of_columns(self, x: torch.Tensor) -> torch.Tensor:
        """[N, ceil(K/g)] -> [N, K]"""
        k = self.q.shape[1]
        return x.repeat_interleave(min(self.group_size, k), 1)[:, :k]

    def integers(self) -> torch.Tensor:
        """weight - zero_point, int64 [N, K]."""
        zeros = torch.full_like(self.scale, 8) if self.zero_point is None else self.zero_point
        return self.q.long() - self.of_columns(zeros).long()

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        return self.integers().to(dtype) * self.of_columns(self.scale).to(dtype)


def group_count(k: int, group_size: int) -> int:
    return -(-k // group_size)


def int4_weight(
    q: torch.Tensor,
    group_size: int = 32,
    scale_dtype: torch.dtype = torch.float32,
    zeros: int | str | None = None,
    scale: float | str | None = None,
) -> Int4Weight:
    """From integers [N, K].

    Args:
        zeros: zero point of all groups, "random" or None.
        scale: of all groups, or "powers" for 0.5, 1 and 2 in turns; None: of ordinary size.
    """
    n, k = q.shape
    g = generator((n, k, group_size, zeros))
    shape = (n, group_count(k, group_size))
    scales = torch.rand(shape, generator=g) * 0.02 + 1e-3
    if scale is not None:
        scales = 2.0 ** torch.randint(-1, 2, shape, generator=g) if scale == "powers" else torch.full(shape, scale)
    zero_point = torch.randint(16, shape, dtype=torch.uint8, generator=g) if zeros == "random" else None
    if isinstance(zeros, int):
        zero_point = torch.full(shape, zeros, dtype=torch.uint8)
    return Int4Weight(q, pack_int4(q), scales.to(scale_dtype), zero_point, group_size)


def random_int4(n: int, k: int, name: object = "int4") -> torch.Tensor:
    return torch.randint(16, (n, k), dtype=torch.uint8, generator=generator(name))


INT4_WEIGHTS: dict[str, Callable[[int, int], torch.Tensor]] = {
    "random": random_int4,
    "all 0": lambda n, k: torch.zeros(n, k, dtype=torch.uint8),
    "all 15": lambda n, k: torch.full((n, k), 15, dtype=torch.uint8),
    "0 and 15": lambda n, k: (torch.arange(k) % 2 * 15).to(torch.uint8).repeat(n, 1),
    "0 and 15 by outputs": lambda n, k: (torch.arange(n) % 2 * 15).to(torch.uint8)[:, None].repeat(1, k),
    "0 and 15 in fours": lambda n, k: (torch.arange(k) // 4 % 2 * 15).to(torch.uint8).repeat(n, 1),
}

# ---- memory layouts of x: a contiguous [m, k] -> a view or copy with other strides ----------------------------------


def _padded(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((x.shape[0] + 2, x.shape[1] + 3), float("nan"), dtype=x.dtype)
    wide[1:-1, 2:-1] = x
    return wide[1:-1, 2:-1]


def _every_second(x: torch.Tensor) -> torch.Tensor:
    wide = torch.full((x.shape[0] * 2, x.shape[1] * 2), float("nan"), dtype=x.dtype)
    wide[::2, ::2] = x
    return wide[::2, ::2]


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def _negated_view(x: torch.Tensor) -> torch.Tensor:
    return torch.complex(x.float(), -x.float()).conj().imag.to(x.dtype)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.t().contiguous().t(),
    "sliced": _padded,
    "every-second": _every_second,
    "unaligned": _unaligned,
    "negated-view": _negated_view,
    "expanded-rows": lambda x: x[:1].expand(x.shape),
    "expanded-columns": lambda x: x[:, :1].expand(x.shape),
    "1-d": lambda x: x[0],
    "3-d": lambda x: x.view(2, x.shape[0] // 2, x.shape[1]),
    "3-d-permuted": lambda x: x.view(2, x.shape[0] // 2, x.shape[1]).transpose(0, 1),
    "4-d-expanded": lambda x: x.view(1, x.shape[0], 1, x.shape[1]).expand(2, -1, 3, -1),
    "empty-3-d": lambda x: x.view(1, *x.shape)[:0],
}


def residual_views(residual: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same [M, N] in other strides."""
    return (residual, residual.t().contiguous().t(), _every_second(residual), _padded(residual), _unaligned(residual))


# ---- small arguments of every op, in the order of its schema --------------------------------------------------------


def _linear_samples() -> Iterator[tuple[Any, ...]]:
    for shape in (Shape("small", 3, 17, 20), Shape("empty", 0, 5, 4), Shape("vector", 1, 48, 33)):
        x, weight, scale, bias = linear_operands(shape, torch.float32)
        packed = torch.ops.tcompress.int8_prepack(weight)
        yield (x, weight, scale, None, None, 8, True, "none", None)
        yield (x.bfloat16(), weight, scale, bias, packed, 7, False, "gelu", torch.float32)
        yield (x.half().t().contiguous().t()[None], weight, scale, bias.half(), packed, 4, True, "silu", torch.int32)
        residual = bias.expand(shape.m, -1)
        yield (x, None, scale, bias, packed, 8, True, "relu", None, residual)


def _int8_unpack_samples() -> Iterator[tuple[Any, ...]]:
    for n, k in ((1, 1), (17, 20), (0, 8), (16, 0), (48, 33)):
        packed = torch.ops.tcompress.int8_prepack(random_weight(n, k))
        yield (packed, n, k, None)
        yield (packed, n, k, torch.arange(n).flip(0)[:: max(n - 1, 1)])


def _int4_weights() -> Iterator[tuple[int, Int4Weight]]:
    """K and a weight."""
    for n, k, group_size in ((1, 1, 32), (17, 70, 64), (0, 8, 32), (16, 0, 128), (49, 33, PER_CHANNEL)):
        q = random_int4(n, k)
        yield k, int4_weight(q, group_size, torch.float16)
        yield k, int4_weight(q, group_size, torch.float32, "random")


def _int4_prepack_samples() -> Iterator[tuple[Any, ...]]:
    for k, w in _int4_weights():
        yield (*w.operands, k, w.group_size)
    yield (w.weight.t().contiguous().t(), w.scale, w.zero_point, k, w.group_size)


def _int4_unpack_samples() -> Iterator[tuple[Any, ...]]:
    for arguments in _int4_prepack_samples():
        _, scale, zero_point, k, group_size = arguments
        packed = torch.ops.tcompress.int4_prepack(*arguments)
        yield (packed, scale.shape[0], k, group_size, scale.dtype, zero_point is not None)


def _int4_linear_samples() -> Iterator[tuple[Any, ...]]:
    for k, w in _int4_weights():
        n, g = len(w.scale), w.group_size
        x, bias = _normal(3, k, torch.float32), torch.randn(n, generator=generator(n))
        packed = torch.ops.tcompress.int4_prepack(*w.operands, k, g)
        yield (x, *w.operands, None, None, g, 8, True, "none", None)
        yield (x.bfloat16(), *w.operands, bias, packed, g, 7, False, "gelu", torch.float32)
        yield (x.half()[:0], *w.operands, bias.half(), packed, g, 2, True, "silu", None)
        strided, residual = x.t().contiguous().t()[None], bias.half().expand(1, 3, n)
        yield (strided, None, *w.operands[1:], bias, packed, g, None, True, "relu", torch.float16, residual)


def _quantize_samples() -> Iterator[tuple[Any, ...]]:
    for bits, symmetric in (W8A8, W8A7):
        yield (_normal(3, 20, torch.float32), bits, symmetric)
        yield (_normal(6, 7, torch.float16).view(2, 3, 7).transpose(0, 1), bits, symmetric)
        yield (_normal(0, 4, torch.bfloat16), bits, symmetric)
        yield (_normal(2, 0, torch.float32).view(1, 2, 0), bits, symmetric)


def _multi_samples(bits: int) -> Iterator[tuple[Any, ...]]:
    """A linear op's samples with two parts alike."""
    samples = _linear_samples() if bits == 8 else _int4_linear_samples()
    count = 4 if bits == 8 else 5  # weight, scale, (zero point,) bias, kernel weight
    for x, *rest in samples:
        parts, tail = rest[:count], rest[count:]
        *settings, activation, out_dtype = tail[:4] if bits == 8 else tail[:5]  # a residual may follow
        if out_dtype == torch.int32:
            continue
        lists = [[part, part] for part in parts]
        for gated in (False, True):
            yield (x, *lists, *settings, activation, gated, out_dtype)


def _requantize_samples() -> Iterator[tuple[Any, ...]]:
    for x, *rest in _linear_samples():
        activation = rest[6]
        for bits, symmetric in (W8A8, W8A7):
            yield (x, *rest[:6], activation, bits, symmetric)


def _quantized_samples() -> Iterator[tuple[Any, ...]]:
    for x, *rest in _linear_samples():
        q = torch.ops.tcompress.quantize_per_token(x, *rest[4:6])
        yield (*q, *rest[:4], rest[6], rest[7] or torch.bfloat16, None)


SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    "quantize_per_token": tuple(_quantize_samples()),
    "int8_prepack": tuple((random_weight(n, k),) for n, k in ((1, 1), (17, 20), (0, 8), (16, 0), (48, 33))),
    "int8_unpack": tuple(_int8_unpack_samples()),
    "int8_linear": tuple(_linear_samples()),
    "int4_prepack": tuple(_int4_prepack_samples()),
    "int4_unpack": tuple(_int4_unpack_samples()),
    "int4_linear": tuple(_int4_linear_samples()),
    "int8_linear_requantize": tuple(_requantize_samples()),
    "int8_linear_quantized": tuple(_quantized_samples()),
    "int8_multi_linear": tuple(_multi_samples(8)),
    "int4_multi_linear": tuple(_multi_samples(4)),
    **attention_samples.SAMPLES,
    **sparse_cases.SAMPLES,
    **static_cases.SAMPLES,
    **int4_sparse_cases.SAMPLES,
}
#: Samples of what the kernels of a GPU take and those of the CPU do not.
GPU_SAMPLES: dict[str, tuple[tuple[Any, ...], ...]] = {
    **sparse_cases.GPU_SAMPLES,
    **int4_sparse_cases.GPU_SAMPLES,
}


def gpu_samples(op: str) -> tuple[tuple[Any, ...], ...]:
    """All samples of an op that a GPU can be asked for."""
    return (*SAMPLES[op], *GPU_SAMPLES.get(op, ()))
