"""torchao's int8 attention."""

from __future__ import annotations

import re

import torch
from peer import Call, CannotRun


def torchao_int8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """`torchao::qscaled_dot_product` on uint8 with static scales. The wheels mostly lack its CPU kernel; what is left
    then is plain torch, which is no peer."""
    import torchao.ops  # noqa: F401  registers the op

    if not re.search("^CPU:", torch._C._dispatch_dump("torchao::qscaled_dot_product"), flags=re.M):
        raise CannotRun("this build of torchao lacks the CPU kernel qscaled_dot_product")
    if causal or q.shape[1] != k.shape[1]:
        raise CannotRun("qscaled_dot_product is called with as many heads of keys as of queries, and no mask")
    (q8, q_scale), (k8, k_scale), (v8, v_scale) = (_quantized(x) for x in (q, k, v))
    largest = float(torch.softmax(q @ k.transpose(2, 3) * q.shape[3] ** -0.5, 3).max())
    out = float(torch.nn.functional.scaled_dot_product_attention(q, k, v).abs().max()) / 127
    arguments = {
        "q_scale": q_scale,
        "q_zp": 128,
        "k_scale": k_scale,
        "k_zp": 128,
        "v_scale": v_scale,
        "v_zp": 128,
        "a_scale": largest / 255,
        "a_zp": 0,
        "o_scale": out,
        "o_zp": 128,
    }

    def run() -> torch.Tensor:
        return torch.ops.torchao.qscaled_dot_product(q8, k8, v8, None, 0.0, False, None, **arguments)

    return lambda: (run().float() - 128) * out


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, float]:
    """uint8 with zero point 128, and the scale of the whole tensor."""
    scale = float(x.abs().max()) / 127
    return ((x / scale).round() + 128).to(torch.uint8), scale
