"""Cases of the attention ops: shapes, layouts, masks, options and values, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cases
import torch

BITS = (8, 12)
Operands = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """`b` sequences, `h` query heads over `hkv` of keys and values, `sq` queries of `d` over `skv` values of `dv`."""

    name: str
    b: int
    h: int
    hkv: int
    sq: int
    skv: int
    d: int
    dv: int

    def __str__(self) -> str:
        return f"{self.name}-{self.b}x{self.h}({self.hkv})x{self.sq}x{self.skv}x{self.d}x{self.dv}"

    @property
    def scores(self) -> tuple[int, int, int, int]:
        """Of a mask."""
        return (self.b, self.h, self.sq, self.skv)


# What the kernels cut a problem into: queries in tiles of 6, keys in blocks of 64 and panels of 16 within, D in pairs
# (12 bits) and fours (8 bits), Dv in 16s.
SHAPES = (
    Shape("no-batch", 0, 2, 2, 5, 7, 8, 8),
    Shape("no-heads", 2, 0, 0, 5, 7, 8, 8),
    Shape("no-queries", 2, 2, 2, 0, 7, 8, 8),
    Shape("no-keys", 2, 2, 2, 5, 0, 8, 8),
    Shape("no-channels", 2, 2, 2, 5, 7, 0, 8),
    Shape("no-values", 2, 2, 2, 5, 7, 8, 0),
    Shape("nothing", 0, 0, 0, 0, 0, 0, 0),
    Shape("one", 1, 1, 1, 1, 1, 1, 1),
    Shape("one-query", 1, 3, 3, 1, 77, 16, 16),
    Shape("one-key", 2, 1, 1, 9, 1, 16, 16),
    Shape("one-channel", 1, 2, 2, 5, 20, 1, 16),
    Shape("one-value", 1, 2, 2, 5, 20, 16, 1),
    Shape("tile6-less-1", 1, 1, 1, 5, 16, 8, 16),
    Shape("tile6", 1, 1, 1, 6, 16, 8, 16),
    Shape("tile6-and-1", 1, 1, 1, 7, 16, 8, 16),
    Shape("two-tiles-and-1", 1, 1, 1, 13, 16, 8, 16),
    Shape("tile16-less-1", 1, 1, 1, 15, 32, 8, 16),
    Shape("tile16-and-1", 1, 1, 1, 17, 32, 8, 16),
    Shape("panel-less-1", 1, 1, 1, 3, 15, 8, 16),
    Shape("panel-and-1", 1, 1, 1, 3, 17, 8, 16),
    Shape("three-panels", 1, 1, 1, 3, 48, 8, 16),
    Shape("block-less-1", 1, 2, 2, 8, 63, 32, 32),
    Shape("block", 1, 2, 2, 8, 64, 32, 32),
    Shape("block-and-1", 1, 2, 2, 8, 65, 32, 32),
    Shape("two-blocks", 1, 2, 2, 8, 128, 32, 32),
    Shape("two-blocks-and-panel", 1, 2, 2, 8, 145, 32, 32),
    Shape("three-blocks-less-1", 1, 1, 1, 191, 191, 32, 32),
    Shape("d2", 1, 2, 1, 4, 20, 2, 16),
    Shape("d3", 1, 2, 2, 4, 20, 3, 16),
    Shape("d5", 1, 2, 2, 4, 20, 5, 16),
    Shape("d15", 1, 2, 2, 4, 20, 15, 15),
    Shape("d17", 1, 2, 2, 4, 20, 17, 17),
    Shape("d31", 1, 2, 2, 4, 66, 31, 47),
    Shape("d33", 1, 2, 2, 4, 66, 33, 33),
    Shape("d63", 1, 2, 2, 7, 66, 63, 64),
    Shape("d64", 2, 2, 2, 70, 70, 64, 64),
    Shape("d65", 1, 2, 2, 7, 66, 65, 63),
    Shape("d80", 1, 2, 2, 12, 66, 80, 80),
    Shape("d96", 1, 2, 2, 12, 66, 96, 96),
    Shape("d128", 1, 2, 2, 18, 130, 128, 128),
    Shape("d255", 1, 1, 1, 7, 66, 255, 255),
    Shape("d256", 1, 1, 1, 7, 66, 256, 256),
    Shape("narrow-values", 1, 2, 2, 7, 66, 128, 16),
    Shape("wide-values", 1, 2, 2, 7, 66, 16, 129),
    Shape("primes", 3, 5, 5, 11, 101, 13, 29),
    Shape("more-queries", 1, 2, 2, 150, 20, 16, 16),
    Shape("more-keys", 1, 2, 2, 20, 300, 16, 16),
    Shape("gqa2", 2, 4, 2, 9, 70, 16, 32),
    Shape("gqa3", 1, 6, 2, 7, 70, 20, 20),
    Shape("mqa", 2, 7, 1, 5, 70, 24, 24),
    Shape("mqa-one-query", 1, 13, 1, 1, 200, 32, 32),
    Shape("many-heads", 2, 37, 37, 5, 10, 8, 8),
    Shape("long", 1, 1, 1, 999, 1013, 64, 64),
    Shape("long-keys", 1, 2, 1, 3, 3001, 32, 32),
)
BY_NAME = {shape.name: shape for shape in SHAPES}


def normal(*shape: int, name: object = "attention") -> torch.Tensor:
    return torch.randn(shape, generator=cases.generator((name, shape)))


def operands(shape: Shape, dtype: torch.dtype = torch.float32) -> Operands:
    """q, k and v, normal; a channel of k has a bias and tokens of v differ in size, so that their scales matter."""
    q = normal(shape.b, shape.h, shape.sq, shape.d, name="q")
    k = normal(shape.b, shape.hkv, shape.skv, shape.d, name="k")
    v = normal(shape.b, shape.hkv, shape.skv, shape.dv, name="v")
    k[..., shape.d // 2 : shape.d // 2 + 1] += 3
    v = v * torch.linspace(0.5, 2, shape.skv)[:, None]
    return q.to(dtype), k.to(dtype), v.to(dtype)


# ---- memory layouts: a contiguous [B, H, S, D] -> a view or copy with other strides ---------------------------------


def _wide(x: torch.Tensor, before: int, after: int) -> torch.Tensor:
    """x within a tensor of NaN, in the last axis and that of the tokens."""
    wide = x.new_full((*x.shape[:2], x.shape[2] + before + after, x.shape[3] + before + after), float("nan"))
    view = wide[:, :, before : before + x.shape[2], before : before + x.shape[3]]
    view.copy_(x)
    return view


def _every_second(x: torch.Tensor) -> torch.Tensor:
    wide = x.new_full((*x.shape[:3], 2 * x.shape[3]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def _unaligned(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.new_zeros(1), x.reshape(-1)])[1:].view(x.shape)


def _one_of_three(x: torch.Tensor) -> torch.Tensor:
    """As q, k and v of one projection, [B, S, 3, H, D]."""
    b, h, s, d = x.shape
    joined = x.new_full((b, s, 3, h, d), float("nan"))
    joined[:, :, 1] = x.transpose(1, 2)
    return joined[:, :, 1].transpose(1, 2)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda x: x,
    "heads-last": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "one-of-three": _one_of_three,
    "batch-last": lambda x: x.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3),
    "sliced": lambda x: _wide(x, 1, 2),
    "every-second-channel": _every_second,
    "channels-first": lambda x: x.mT.contiguous().mT,
    "unaligned": _unaligned,
    "expanded-batch": lambda x: x[:1].expand(x.shape),
    "expanded-heads": lambda x: x[:, :1].expand(x.shape),
    "expanded-tokens": lambda x: x[:, :, :1].expand(x.shape),
    "expanded-channels": lambda x: x[..., :1].expand(x.shape),
    "negated-view": lambda x: torch.complex(x.float(), -x.float()).conj().imag.to(x.dtype),
}


# ---- masks: (scores' shape) -> a tensor that broadcasts to it -------------------------------------------------------


def _random_bool(*shape: int) -> torch.Tensor:
    return normal(*shape, name="mask") > -0.3


def _keys_of_different_lengths(shape: Shape) -> torch.Tensor:
    lengths = torch.arange(shape.b) * 5 + shape.skv // 3
    return (torch.arange(shape.skv) < lengths[:, None])[:, None, None]


def _some_rows_hidden(shape: Shape) -> torch.Tensor:
    keep = _random_bool(*shape.scores)
    keep[:, :, ::3] = False
    return keep


def _one_block_hidden(shape: Shape) -> torch.Tensor:
    keep = torch.ones(shape.sq, shape.skv, dtype=torch.bool)
    keep[:, :64] = False
    return keep


def _minus_infinity(*shape: int) -> torch.Tensor:
    added = normal(*shape, name="added")
    added[added < -0.5] = float("-inf")
    added[..., ::4, :] = float("-inf")
    return added


def _lowest(shape: Shape) -> torch.Tensor:
    """As Hugging Face's masks: 0, or the lowest number of the type; some rows have nothing else."""
    added = torch.where(_random_bool(*shape.scores), 0.0, torch.finfo(torch.float32).min)
    added[:, :, ::5] = torch.finfo(torch.float32).min
    return added


MASKS: dict[str, Callable[[Shape], torch.Tensor]] = {
    "all-true": lambda s: torch.ones(s.scores, dtype=torch.bool),
    "all-false": lambda s: torch.zeros(s.scores, dtype=torch.bool),
    "random": lambda s: _random_bool(*s.scores),
    "random-per-head": lambda s: _random_bool(1, s.h, 1, s.skv),
    "random-2-d": lambda s: _random_bool(s.sq, s.skv),
    "random-1-d": lambda s: _random_bool(s.skv),
    "random-queries": lambda s: _random_bool(s.b, 1, s.sq, 1),
    "one-true": lambda s: torch.ones(1, dtype=torch.bool),
    "scalar-true": lambda s: torch.tensor(True),
    "key-padding": _keys_of_different_lengths,
    "rows-hidden": _some_rows_hidden,
    "first-block-hidden": _one_block_hidden,
    "transposed": lambda s: _random_bool(s.b, s.h, s.skv, s.sq).mT,
    "every-second": lambda s: _random_bool(s.b, 1, s.sq, 2 * s.skv)[..., ::2],
    "added": lambda s: normal(*s.scores),
    "added-bfloat16": lambda s: normal(*s.scores).bfloat16(),
    "added-float16": lambda s: normal(s.sq, s.skv).half(),
    "added-per-head": lambda s: normal(1, s.h, 1, s.skv),
    "added-per-query": lambda s: normal(1, s.h, s.sq, 1),  # leaves the softmax as it is
    "added-scalar": lambda s: torch.tensor(-0.5),
    "added-transposed": lambda s: normal(s.skv, s.sq).mT,
    "added-unaligned": lambda s: _unaligned(normal(*s.scores)),
    "minus-infinity": lambda s: _minus_infinity(*s.scores),
    "minus-infinity-bfloat16": lambda s: _minus_infinity(*s.scores).bfloat16(),
    "minus-infinity-float16": lambda s: _minus_infinity(s.b, 1, s.sq, s.skv).half(),
    "lowest": _lowest,
    "lowest-bfloat16": lambda s: _lowest(s).clamp_min(torch.finfo(torch.bfloat16).min).bfloat16(),
    "lowest-float16": lambda s: _lowest(s).clamp_min(torch.finfo(torch.float16).min).half(),
    "large": lambda s: normal(*s.scores) * 1e3,
    "alibi": lambda s: (
        (torch.arange(s.skv) - torch.arange(s.sq)[:, None]) * torch.linspace(0.01, 1, s.h)[:, None, None]
    ),
}

#: Keyword arguments of `quantized_attention` apart from the mask.
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "top-left": {"is_causal": "top_left"},
    "bottom-right": {"is_causal": "bottom_right"},
    "window-1": {"window": 1},
    "window-9": {"window": 9},
    "window-70": {"window": 70},
    "window-left": {"window": (5, -1)},
    "window-right": {"window": (-1, 3)},
    "window-both": {"window": (66, 2)},
    "window-0": {"window": (0, 0)},
    "window-none": {"window": (-1, -1)},
    "causal-window": {"is_causal": True, "window": 7},
    "causal-window-both": {"is_causal": True, "window": (80, 40)},
    "bottom-right-window": {"is_causal": "bottom_right", "window": 65},
    "bottom-right-window-both": {"is_causal": "bottom_right", "window": (3, -1)},
    "softcap": {"softcap": 2.0},
    "softcap-causal": {"softcap": 30.0, "is_causal": "bottom_right", "window": (50, -1)},
    "scale": {"scale": 1.7},
    "scale-negative": {"scale": -0.4, "is_causal": True},
    "scale-negative-softcap": {"scale": -0.9, "softcap": 1.5},
    "scale-0": {"scale": 0.0},
    "scale-tiny": {"scale": 1e-30},
}

#: Shapes for masks and options: more keys than queries, and the other way round; heads that share.
MASKED = (
    Shape("wide", 2, 4, 2, 13, 150, 12, 20),
    Shape("tall", 1, 2, 2, 150, 70, 12, 20),
    Shape("short", 2, 2, 1, 7, 5, 9, 17),
)


# ---- values: operands -> operands ----------------------------------------------------------------------------------


def _set(which: int, index: tuple[Any, ...], value: Callable[[torch.dtype], float]) -> Callable[..., Operands]:
    def change(*qkv: torch.Tensor) -> Operands:
        changed = [x.clone() for x in qkv]
        changed[which][index] = value(changed[which].dtype)
        return changed[0], changed[1], changed[2]

    return change


def _scaled(*factors: float) -> Callable[..., Operands]:
    def change(*qkv: torch.Tensor) -> Operands:
        q, k, v = ((x.float() * f).to(x.dtype) for x, f in zip(qkv, factors, strict=True))
        return q, k, v

    return change


def _max_floats(*qkv: torch.Tensor) -> Operands:
    q, k, v = (x.clone() for x in qkv)
    for x in (q, v):
        x[:, :, ::3], x[:, :, 1::3, ::2] = torch.finfo(x.dtype).max, torch.finfo(x.dtype).min
    return q, k, v


#: A token in the first, and one in the second block of keys of a shape with at least 70.
FIRST, SECOND = (slice(None), slice(None), 11), (slice(None), 0, 66)
VALUES: dict[str, Callable[..., Operands]] = {
    "zero-q": _scaled(0, 1, 1),
    "zero-k": _scaled(1, 0, 1),
    "zero-v": _scaled(1, 1, 0),
    "zeros": _scaled(0, 0, 0),
    "negative-zeros": _scaled(-0.0, -0.0, -0.0),
    "zero-tokens": lambda q, k, v: (
        q,
        k * (torch.arange(k.shape[2]) % 2)[:, None],
        v * (torch.arange(v.shape[2]) > 63)[:, None],
    ),
    "equal-keys": lambda q, k, v: (q, k[:, :, :1].expand(k.shape), v),
    "large-scores": _scaled(30, 30, 1),
    "huge-scores": _scaled(200, 200, 1),
    "small": _scaled(1e-6, 1e-6, 1e-6),
    "subnormal": _scaled(1e-40, 1e-40, 1e-40),
    "outlier-1e4-q": _set(0, (0, 0, 2, 3), lambda t: 1e4),
    "outlier-1e4-k": _set(1, (*FIRST, 3), lambda t: 1e4),
    "outlier-1e4-v": _set(2, (*SECOND, 3), lambda t: -1e4),
    "outlier-1e30-q": _set(0, (0, 0, 2, 3), lambda t: min(1e30, torch.finfo(t).max)),
    "outlier-1e30-k": _set(1, (*SECOND, 3), lambda t: -min(1e30, torch.finfo(t).max)),
    "outlier-1e30-v": _set(2, (*FIRST, 3), lambda t: min(1e30, torch.finfo(t).max)),
    "max-floats": _max_floats,
    "max-float-k": _set(1, FIRST, lambda t: torch.finfo(t).max),
    "channel-bias": lambda q, k, v: (q, k + 8 * normal(k.shape[3]).to(k.dtype), v),
    "nan-q": _set(0, (0, 0, 2, 3), lambda t: float("nan")),
    "nan-k": _set(1, (*SECOND, 3), lambda t: float("nan")),
    "nan-v": _set(2, (*FIRST, 0), lambda t: float("nan")),
    "inf-q": _set(0, (0, 0, 2, 3), lambda t: float("inf")),
    "inf-k": _set(1, (*FIRST, 3), lambda t: float("-inf")),
    "inf-v": _set(2, (*SECOND, 0), lambda t: float("inf")),
}
#: Of which the results are ordinary numbers.
FINITE_VALUES = tuple(name for name in VALUES if not name.startswith(("nan", "inf", "max", "outlier-1e30", "huge")))
