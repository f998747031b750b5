"""The twins of a tensor: what its channels would become if each were scaled by a power of two of its own.

::

    source y [..., N]      base twin     b, random, of both signs
                           double        2 b
                           digits        b · 2^e,  e = a digit of the channel's number, one twin a digit
"""

from __future__ import annotations

import math
from typing import Any

import torch

#: Bits of a channel's number that one twin carries. Float16 has few exponents to spare.
_BITS, _HALF_BITS = 4, 2


def start(output: torch.Tensor) -> list[torch.Tensor]:
    """The twins of a source's output [..., N]: base, double, and one a digit of the channel's number."""
    generator = torch.Generator().manual_seed(0)
    size = torch.rand(output.shape, generator=generator) + 0.5
    sign = torch.randint(0, 2, output.shape, generator=generator) * 2.0 - 1
    base = (size * sign).to(output.device, output.dtype)
    bits = _bits(output)
    n = output.shape[-1]
    numbers = torch.arange(n, device=output.device)
    digits = max(1, math.ceil(math.log2(max(n, 2)) / bits))
    twins = [base, base * 2]
    for i in range(digits):
        exponents = (numbers >> (i * bits)) % 2**bits - 2 ** (bits - 1)
        twins.append(base * torch.exp2(exponents.float()).to(output.dtype))
    return twins


def _bits(tensor: torch.Tensor) -> int:
    return _HALF_BITS if tensor.dtype == torch.float16 else _BITS


def all_equal(values: list[Any]) -> bool:
    """Whether an operation's result is the same for all twins."""
    first = values[0]
    if isinstance(first, torch.Tensor):
        return all(torch.equal(first, other) for other in values[1:])
    return all(first == other for other in values[1:])


def scaled(twins: list[torch.Tensor]) -> bool:
    """Whether the double is twice the base, and each digit twin the base times powers of two."""
    base, least = twins[0].float(), _least(twins[0])
    exact = ~(base.abs() < least)  # NaN is compared, and differs
    if not torch.equal((twins[1].float())[exact], base[exact] * 2):
        return False
    mantissa = torch.frexp(base[exact]).mantissa
    for twin in (twin.float() for twin in twins[2:]):
        if not torch.equal(torch.frexp(twin[exact]).mantissa, mantissa) or (twin[~exact].abs() > least**0.5).any():
            return False
    return True


def _least(tensor: torch.Tensor) -> float:
    """Below this a twin may have lost digits: float16 has few exponents."""
    return float(torch.finfo(tensor.dtype).tiny * 2 ** _bits(tensor))


def channels_of(twins: list[torch.Tensor]) -> torch.Tensor | None:
    """Which channel of the source each input [K] is, -1 where it is zero throughout; None if that differs by token."""
    base, bits = twins[0], _bits(twins[0])
    rows = base.reshape(-1, base.shape[-1])
    exponent, seen = torch.frexp(rows.float()).exponent, rows.float().abs() >= _least(base)
    first = seen.int().argmax(0, keepdim=True)
    channels = torch.zeros(rows.shape[1], dtype=torch.long, device=rows.device)
    for i, twin in enumerate(twins[2:]):
        digits = torch.frexp(twin.reshape(rows.shape).float()).exponent - exponent + 2 ** (bits - 1)
        digit = digits.gather(0, first)
        if bool(((digits != digit) & seen).any()) or bool(((digit < 0) | (digit >= 2**bits)).any()):
            return None
        channels += digit[0].long() << (i * bits)
    return channels.masked_fill(~seen.any(0), -1)


def contained(twins: list[torch.Tensor], size: int) -> torch.Tensor:
    """Which of the source's channels, bool [size], are in the twins' tensor; all where that cannot be told."""
    base, bits = twins[0].float(), _bits(twins[0])
    seen = base.abs() >= _least(twins[0])
    exponent = torch.frexp(base[seen]).exponent
    numbers = torch.zeros_like(exponent, dtype=torch.long)
    for i, twin in enumerate(twins[2:]):
        numbers += (torch.frexp(twin.float()[seen]).exponent - exponent + 2 ** (bits - 1)).long() << (i * bits)
    found = torch.zeros(size, dtype=torch.bool)
    if bool(((numbers < 0) | (numbers >= size)).any()):
        return ~found
    found[numbers.cpu()] = True
    return found
