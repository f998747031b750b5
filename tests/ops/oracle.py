"""What the ops should compute, in numpy's integers and float64 (and, where the definition names float32 steps, numpy's
float32): nothing here calls the library. With it, the one rule by which float results are judged.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F

MIN_RANGE = 2.0**-100
HALF_ULP = 2.0**-24  # relative error of one float32 rounding

Quantized = tuple[np.ndarray, np.ndarray, np.ndarray]  # q, scale, zero_point


def to_float32(x: torch.Tensor) -> np.ndarray:
    """[..., K] of any float type to a [M, K] array, exactly."""
    rows = math.prod(x.shape[:-1])
    return x.detach().float().contiguous().numpy().reshape(rows, x.shape[-1])


def quantize(x: np.ndarray, bits: int, symmetric: bool) -> Quantized:
    """The definition of `quantize_per_token`, one row at a time: q and zero_point as int64, scale as float32."""
    f = np.float32
    q_max = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    q = np.zeros(x.shape, np.int64)
    scale, zero_point = np.full(len(x), np.nan, f), np.zeros(len(x), np.int64)
    step = f(1) / f(q_max)
    for i, row in enumerate(x):
        if not np.isfinite(row).all():
            continue
        lo, hi = min(row.min(initial=f(0)), f(0)), max(row.max(initial=f(0)), f(0))
        wanted = max(-lo, hi) * step if symmetric else hi * step - lo * step
        scale[i] = max(wanted, f(MIN_RANGE) * step)
        inverse = f(1) / scale[i]
        if not symmetric:
            zero_point[i] = int(np.rint(-lo * inverse))
        rounded = np.rint(row * inverse).astype(np.int64) + zero_point[i]
        q[i] = np.clip(rounded, -q_max if symmetric else 0, q_max)
    return q, scale, zero_point


def assert_quantized(x: np.ndarray, result: Quantized, bits: int, symmetric: bool) -> None:
    """Checks one quantization against real numbers: the scale of the range, and the integer nearest to each element."""
    q, scale, zero_point = result
    q_max = 2 ** (bits - 1) - 1 if symmetric else 2**bits - 1
    q_min = -q_max if symmetric else 0
    finite = np.isfinite(x).all(1)
    assert np.isnan(scale[~finite]).all()
    assert not q[~finite].any()
    assert not zero_point[~finite].any()
    x, q, zero_point = x[finite].astype(np.float64), q[finite], zero_point[finite]
    scale = scale[finite].astype(np.float64)
    lo, hi = x.min(1, initial=0.0), x.max(1, initial=0.0)
    span = np.maximum(np.maximum(-lo, hi) if symmetric else hi - lo, MIN_RANGE)
    # Three roundings: the reciprocal of q_max and, at worst, two products and their sum.
    np.testing.assert_allclose(scale, span / q_max, rtol=4 * HALF_ULP, atol=0)
    # A quotient has two roundings (reciprocal, product); next to a tie either neighbour is right. A reciprocal below
    # the normal numbers (a scale above 2^126) has fewer bits.
    slack = q_max * np.where(scale > 2.0**126, 2.0**-21, 4 * HALF_ULP)
    expected_zero = np.zeros(len(x)) if symmetric else -lo / scale
    assert (np.abs(zero_point - expected_zero) <= 0.5 + slack).all()
    expected = np.clip(x / scale[:, None] + zero_point[:, None], q_min, q_max)
    assert (np.abs(q - expected) <= 0.5 + slack[:, None]).all()
    assert ((q >= q_min) & (q <= q_max)).all()


def accumulate(q: np.ndarray, zero_point: np.ndarray, weight: torch.Tensor) -> np.ndarray:
    """Σ_k (q - zero_point) · weight in int64, and whether that fits the op's int32."""
    acc = (q - zero_point[:, None]) @ weight.numpy().astype(np.int64).T
    assert np.abs(acc).max(initial=0) < 2**31
    return acc


def activate_float64(y: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation of float64 `y`, in forms that keep their digits far to the left."""
    assert y.dtype == torch.float64
    if activation == "relu":
        return torch.where(y < 0, 0.0, y)
    if activation == "gelu":
        return y * (torch.special.erfc(-y / math.sqrt(2)) / 2)
    if activation == "gelu_tanh":
        return y / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
    if activation == "silu":
        return y / (1 + torch.exp(-y))
    return y


def activate_float32(y: torch.Tensor, activation: str) -> torch.Tensor:
    """torch's own float32 function: the yardstick."""
    assert y.dtype == torch.float32
    functions = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}
    return functions[activation](y) if activation in functions else y


def assert_accurate(
    got: torch.Tensor, by_torch: torch.Tensor, exact: torch.Tensor, tolerance: float, what: object = ""
) -> None:
    """The rule for float results.

    The largest error against float64 is at most `tolerance` times the largest error of torch's own computation in the
    same type, plus one float32 unit in the last place of the largest output (torch may happen to be exact), or the
    smallest normal float32 where that is more.

    Where the exact result is NaN or, in the type of the result, infinite, torch's result or the exact one is due. Where
    it is finite, the result is finite, unless torch overflows too.
    """
    assert got.dtype == by_torch.dtype, what
    assert got.shape == by_torch.shape == exact.shape, what
    rounded = exact.to(got.dtype)
    limit = ~torch.isfinite(rounded)
    alike = (got == rounded) | (got == by_torch) | (got.isnan() & (rounded.isnan() | by_torch.isnan()))
    assert alike[limit].all(), f"{what}: not finite: got {got[limit]}, expected {rounded[limit]}"
    comparable = ~limit & torch.isfinite(by_torch)
    assert (torch.isfinite(got) | ~comparable | limit).all(), f"{what}: not finite where torch is"
    if not comparable.any():
        return
    exact = exact[comparable]
    error = (got[comparable].double() - exact).abs().max().item()
    error_of_torch = (by_torch[comparable].double() - exact).abs().max().item()
    ulp = max(float(np.spacing(np.float32(exact.abs().max().item()))), float(np.finfo(np.float32).tiny))
    assert error <= tolerance * error_of_torch + ulp, (
        f"{what}: error {error:.3g}, expected at most {tolerance} * {error_of_torch:.3g} (torch) + {ulp:.3g} (one ulp)"
    )


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in type, shape and every bit, signs of zeros included; a NaN equals a NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {4: torch.int32, 2: torch.int16}[a.element_size()]
    nan = a.isnan()
    return torch.equal(nan, b.isnan()) and torch.equal(a.view(integer)[~nan], b.view(integer)[~nan])
