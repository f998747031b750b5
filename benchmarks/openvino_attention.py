"""OpenVINO's attentions: fused, in float or in int8 with static scales, and the one that keeps its cache itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from openvino_call import call, compiled
from peer import Call, CannotRun


def openvino_attention(precision: str) -> Callable[..., Call]:
    """`ScaledDotProductAttention`."""

    def factory(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
        import openvino
        from openvino import opset13 as ops

        groups = q.shape[1] // k.shape[1]
        inputs = [ops.parameter(list(x.shape), openvino.Type.f32) for x in (q, k, v)]
        heads = [inputs[0], *(_repeated(x, groups) for x in inputs[1:])]
        y = ops.scaled_dot_product_attention(*heads, causal=causal)
        return call(compiled(openvino.Model([y], inputs, "attention"), precision), (q, k, v))

    return factory


def openvino_int8(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    """Q, K, V and the probabilities in int8, one static scale a tensor, calibrated on these very inputs: what a model
    quantized by OpenVINO's tools runs. A probability far below the largest rounds to zero, hence the error."""
    import openvino
    from openvino import opset13 as ops

    if causal or q.shape[1] != k.shape[1]:
        raise CannotRun("the int8 attention is built for as many heads of keys as of queries, and no mask")
    scale = q.shape[3] ** -0.5
    largest = max(float(torch.softmax(a @ b.t() * scale, 1).max()) for a, b in zip(q[0], k[0], strict=True))

    def quantized(x: Any, low: float, high: float) -> Any:
        bounds = ops.constant(torch.tensor(low).numpy()), ops.constant(torch.tensor(high).numpy())
        return ops.fake_quantize(x, *bounds, *bounds, 256)

    inputs = [ops.parameter(list(x.shape), openvino.Type.f32) for x in (q, k, v)]
    bounds = [float(x.abs().max()) for x in (q, k, v)]
    keys = [quantized(x, -b * 128 / 127, b) for x, b in zip(inputs, bounds, strict=True)]
    scores = ops.multiply(ops.matmul(keys[0], keys[1], False, True), ops.constant(torch.tensor(scale).numpy()))
    y = ops.matmul(quantized(ops.softmax(scores, 3), 0.0, largest), keys[2], False, False)
    return call(compiled(openvino.Model([y], inputs, "attention"), "f32"), (q, k, v))


def openvino_cache(precision: str, cache: str) -> Callable[..., Call]:
    """One token over a cache that OpenVINO keeps, in the type `cache`: f32, bf16, or u8 with a scale a token and head.

    Every call appends the last token, so the cache is set back each time it has grown by a 64th.
    """

    def factory(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
        import openvino

        model = compiled(_cached_model(q.shape[1], k.shape[1], q.shape[3]), precision, KV_CACHE_PRECISION=cache)
        request = model.create_infer_request()
        token = [x.contiguous().numpy() for x in (q, k[:, :, -1:], v[:, :, -1:], torch.arange(len(q)).int())]
        past = {name: openvino.Tensor(x[:, :, :-1].contiguous().numpy()) for name, x in (("k", k), ("v", v))}
        request.infer(token)  # makes the variables
        calls, limit = 0, max(1, k.shape[2] // 64)

        def run() -> torch.Tensor:
            nonlocal calls
            if calls % limit == 0:
                for state in request.query_state():
                    state.state = past[state.name]
            calls += 1
            return torch.from_numpy(request.infer(token, share_inputs=True, share_outputs=True)[0])

        return run

    return factory


def _repeated(x: Any, groups: int) -> Any:
    """Every head of [B, Hkv, S, D] so many times: the pattern that OpenVINO fuses into its attention over a cache."""
    from openvino import opset13 as ops

    if groups == 1:
        return x
    shape = ops.shape_of(x, "i32")
    b, heads, tokens, d = (ops.gather(shape, _ints([i]), _ints(0)) for i in range(4))
    wide = ops.concat([b, heads, _ints([groups]), tokens, d], 0)
    copies = ops.broadcast(ops.unsqueeze(x, _ints(2)), wide, broadcast_spec="BIDIRECTIONAL")
    joined = ops.concat([b, ops.multiply(heads, _ints([groups])), tokens, d], 0)
    return ops.reshape(copies, joined, False)


def _ints(values: int | list[int]) -> Any:
    from openvino import opset13 as ops

    return ops.constant(torch.tensor(values, dtype=torch.int32).numpy())


def _cached_model(heads: int, heads_kv: int, d: int) -> Any:
    """(q, k, v, rows of the cache that each batch entry goes on with) to the attention over all tokens so far."""
    import openvino
    from openvino import opset13 as ops
    from openvino.op.util import Variable, VariableInfo

    def parameter(h: int) -> Any:
        return ops.parameter(openvino.PartialShape([-1, h, -1, d]), openvino.Type.f32)

    q, new = parameter(heads), {"k": parameter(heads_kv), "v": parameter(heads_kv)}
    rows = ops.parameter(openvino.PartialShape([-1]), openvino.Type.i32)
    sinks, outputs = [], []
    for name, token in new.items():
        info = VariableInfo()
        info.variable_id, info.data_type = name, openvino.Type.f32
        info.data_shape = openvino.PartialShape([-1, heads_kv, -1, d])
        variable = Variable(info)
        past = ops.read_value(ops.constant(torch.zeros(1, heads_kv, 0, d).numpy()), variable)
        tokens = ops.concat([ops.gather(past, rows, _ints(0)), token], 2)
        sinks.append(ops.assign(tokens, variable))
        outputs.append(_repeated(tokens, heads // heads_kv))
    result = ops.result(ops.scaled_dot_product_attention(q, *outputs))
    return openvino.Model([result], sinks, [q, *new.values(), rows], "attention")
