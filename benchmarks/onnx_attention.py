"""ONNX Runtime's attentions. All that work on several tokens compute in float32; only its cache may hold int8.

Its one op named for quantized attention, `QAttention`, multiplies the projections of Q, K and V in int8 and attends in
float32, in one node that cannot be called without the projections.
"""

from __future__ import annotations

from typing import Any

import torch
from onnx_call import call, model, session
from peer import Call, CannotRun

#: ai.onnx has `Attention` since this version.
ATTENTION_OPSET = 23


def _joined(x: torch.Tensor) -> torch.Tensor:
    """[B, H, S, D] as [B, S, H·D]."""
    return x.transpose(1, 2).flatten(2).contiguous()


def _split(y: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """[B, S, H·D] as [B, H, S, D], a view."""
    return y.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)


def onnxruntime_multi_head(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """`com.microsoft.MultiHeadAttention` on [B, S, H·D], the layout that a projection gives."""
    from onnx import helper

    if q.shape[1] != k.shape[1]:
        raise CannotRun("MultiHeadAttention has as many heads of keys as of queries")
    inputs = {"q": _joined(q), "k": _joined(k), "v": _joined(v)}
    options: dict[str, Any] = {"num_heads": q.shape[1], "unidirectional": int(causal), "domain": "com.microsoft"}
    node = helper.make_node("MultiHeadAttention", list(inputs), ["y"], **options)
    run = call(model([node], inputs, {"y": inputs["q"]}, {}).SerializeToString(), inputs)
    return lambda: _split(run(), q)


def onnxruntime_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """`ai.onnx.Attention` on [B, H, S, D]."""
    from onnx import helper

    inputs = {"q": q, "k": k, "v": v}
    node = helper.make_node("Attention", list(inputs), ["y"], is_causal=int(causal))
    return call(model([node], inputs, {"y": q}, {}, opset=ATTENTION_OPSET).SerializeToString(), inputs)


def onnxruntime_grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """`com.microsoft.GroupQueryAttention` of a whole prompt, on [B, S, H·D]; also writes K and V out as a cache."""
    from onnx import helper

    if not causal:
        raise CannotRun("GroupQueryAttention is measured where it is meant for: causal")
    tokens = q.shape[2]
    inputs = {
        "q": _joined(q),
        "k": _joined(k),
        "v": _joined(v),
        "last": torch.full((q.shape[0],), tokens - 1, dtype=torch.int32),
        "total": torch.tensor(tokens, dtype=torch.int32),
    }
    options: dict[str, Any] = {"num_heads": q.shape[1], "kv_num_heads": k.shape[1], "domain": "com.microsoft"}
    names = ["q", "k", "v", "", "", "last", "total"]
    node = helper.make_node("GroupQueryAttention", names, ["y", "keys", "values"], **options)
    outputs = {"y": inputs["q"], "keys": k, "values": v}
    run = call(model([node], inputs, outputs, {}).SerializeToString(), inputs)
    return lambda: _split(run(), q)


def onnxruntime_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """`GroupQueryAttention` of one token over a float32 cache."""
    return _cached(q, {"past_k": k, "past_v": v}, k, v, {}, {})


def onnxruntime_int8_cache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """`GroupQueryAttention` of one token over an int8 cache with one scale for all of K and one for all of V.

    A scale a channel is the other choice: a little more exact, and slower (1.0 against 0.7 ms at llama-8b's shape).
    """
    scales = {f"{name}_scale": x.abs().max().reshape(1) / 127 for name, x in (("k", k), ("v", v))}
    past = {f"past_{name}": (x / scales[f"{name}_scale"]).round().to(torch.int8) for name, x in (("k", k), ("v", v))}
    options = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}
    return _cached(q, past, k, v, scales, options)


def _cached(
    q: torch.Tensor,
    past: dict[str, torch.Tensor],
    k: torch.Tensor,
    v: torch.Tensor,
    scales: dict[str, torch.Tensor],
    options: dict[str, Any],
) -> Call:
    """Every call writes the last token into the cache, at the same place, and attends to all. The cache is an output
    too, bound to the same memory: otherwise it would be copied."""
    import onnxruntime
    from onnx import helper

    tokens = k.shape[2]
    inputs = {
        "q": _joined(q),
        "k": _joined(k[:, :, -1:]),
        "v": _joined(v[:, :, -1:]),
        **{name: x.clone() for name, x in past.items()},
        "last": torch.full((q.shape[0],), tokens - 1, dtype=torch.int32),
        "total": torch.tensor([tokens], dtype=torch.int32),
    }
    names = [*inputs, *([""] * 5 if scales else []), *scales]
    options = {"num_heads": q.shape[1], "kv_num_heads": k.shape[1], "domain": "com.microsoft", **options}
    node = helper.make_node("GroupQueryAttention", names, ["y", "keys", "values"], **options)
    outputs = {"y": inputs["q"], "keys": inputs["past_k"], "values": inputs["past_v"]}
    running = session(model([node], inputs, outputs, scales).SerializeToString())
    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(x.numpy()) for name, x in inputs.items()}
    y = torch.empty_like(inputs["q"])
    result = onnxruntime.OrtValue.ortvalue_from_numpy(y.numpy())
    binding = running.io_binding()
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for name, value in (("y", result), ("keys", values["past_k"]), ("values", values["past_v"])):
        binding.bind_ortvalue_output(name, value)

    def run() -> torch.Tensor:
        running.run_with_iobinding(binding)
        return _split(torch.from_numpy(result.numpy()), q)

    return run
