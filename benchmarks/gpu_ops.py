"""Times the ops on this machine's GPU, by backend, beside torch's own.

    python benchmarks/gpu_ops.py [--json FILE] [--part linear|attention|varlen|cache|int4|sparse ...]

A time is that of one call in a CUDA graph of several, median of its replays, with the quantization of activations;
weights take turns, so that none is in the second-level cache. Errors: of linear layers ‖Δ‖/‖y‖, of attention
Σ|Δ|/Σ|O|, against float64 (int4: of the 4-bit weight, which torch's bf16 layer does not have). TCOMPRESS_TUNE=0 keeps
to the stored tiles.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import gpu_peers
import torch
import torch.nn.functional as F
from rich.console import Console
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from tcompress import KVCache, cuda_backend, ops, triton_backend, use_backend
from tcompress.nn import SparseLinear
from tcompress.prune import magnitude_mask
from tcompress.quantize import round_to_nearest
from tcompress.quantize.scheme import Scheme

Call = Callable[[], Any]
Calls = dict[str, list[Call]]
Row = dict[str, Any]
#: Bytes of weights that take turns: more than any second-level cache.
TURNS = 120e6
BACKENDS = [
    name for name, why in (("triton", triton_backend.WHY_NO_TRITON), ("cuda", cuda_backend.WHY_NOT)) if why is None
]


def seconds(calls: list[Call], target: float = 0.008) -> float:
    """Of one call; `calls` take turns in one CUDA graph that lasts about `target`."""
    for call in calls[:2]:
        call()
    once = _elapsed(calls[0])
    count = max(len(calls), min(40, int(target / once)) // len(calls) * len(calls))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(count):
                calls[i % len(calls)]()
        graph.replay()
        return statistics.median(_elapsed(graph.replay) for _ in range(7)) / count


def _elapsed(call: Call) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return max(begin.elapsed_time(end) * 1e-3, 2e-6)


def forced(name: str, call: Call) -> Call:
    def run() -> Any:
        with use_backend(name):
            return call()

    return run


def turns(bytes_of_one: float) -> int:
    return max(2, math.ceil(TURNS / bytes_of_one))


def linear() -> Iterator[Row]:
    for n, k in ((4096, 4096), (11008, 4096)):
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(turns(n * k))]
        scales = [w.float().abs().amax(1) / 127 for w in weights]
        integers = [(w.float() / s[:, None]).round().to(torch.int8) for w, s in zip(weights, scales, strict=True)]
        bias = torch.randn(n, device="cuda")
        for m in (1, 16, 128, 512, 2048, 8192):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            exact = x[:64].double() @ weights[0].double().T + bias.double()
            calls: Calls = {"torch bf16": [partial(F.linear, x, w, bias.bfloat16()) for w in weights]}
            triples = zip(integers, scales, strict=True)
            calls["torch._int_mm"] = [partial(gpu_peers.int_mm, x, q, s, bias) for q, s in triples]
            for name in BACKENDS:
                pairs = zip(integers, scales, strict=True)
                calls[name] = [forced(name, partial(ops.int8_linear, x, q, s, bias)) for q, s in pairs]
            yield _row("int8_linear", f"{m}x{k}x{n}", calls, partial(_norm, exact))


def attention() -> Iterator[Row]:
    for d in (64, 128):
        for s in (256, 1024, 4096, 8192):
            for causal in (False, True):
                q, k, v = (torch.randn(4, 32, s, d, device="cuda", dtype=torch.float16) for _ in range(3))
                exact = _attention(q[:1, :1], k[:1, :1], v[:1, :1], causal)

                calls: Calls = {
                    "flash": [partial(torch_own, SDPBackend.FLASH_ATTENTION, q, k, v, causal)],
                    "cudnn": [partial(torch_own, SDPBackend.CUDNN_ATTENTION, q, k, v, causal)],
                }
                for name in BACKENDS:
                    ours = partial(ops.quantized_attention, q, k, v, bits=8, is_causal=causal)
                    calls[name] = [forced(name, ours)]
                calls |= {name: [call] for name, call in gpu_peers.attention(q, k, v, causal).items()}
                shape = f"4x32x{s}x{d}{' causal' if causal else ''}"
                yield _row("attention", shape, calls, partial(_sums, exact))


def varlen() -> Iterator[Row]:
    """Sequences of 64 to 4096 tokens laid end to end, beside torch's attention over the same padded."""
    for d in (64, 128):
        lengths = [64, 4096, 700, 1500, 128, 2048, 300, 3000]
        q, k, v = (torch.randn(sum(lengths), 32, d, device="cuda", dtype=torch.float16) for _ in range(3))
        ends = torch.tensor([0, *lengths]).cumsum(0)
        offsets = ends.cuda()
        padded = [pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2) for x in (q, k, v)]
        first = [x[: lengths[0]].transpose(0, 1)[None, :1] for x in (q, k, v)]
        exact = _attention(first[0], first[1], first[2], True)[0].transpose(0, 1)
        ours = partial(
            ops.quantized_attention_varlen, q, k, v, offsets, offsets, bits=8, is_causal=True
        )  # as flash_attn_varlen_func is called
        calls: Calls = {
            "torch SDPA, padded": [partial(_padded, padded[0], padded[1], padded[2], lengths[0])],
            "triton": [forced("triton", ours)],
        }
        calls |= {name: [call] for name, call in gpu_peers.varlen(q, k, v, offsets, max(lengths)).items()}
        yield _row("varlen", f"8 sequences, {sum(lengths)}x32x{d} causal", calls, partial(_first_sequence, exact))


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int) -> torch.Tensor:
    """All sequences; what is returned is laid out as the first of the others' results."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)[0].transpose(0, 1)[:first]


def _first_sequence(exact: torch.Tensor, o: torch.Tensor) -> float:
    """Of the first head of the first sequence."""
    return ((o[: len(exact), :1].double() - exact).abs().sum() / exact.abs().sum()).item()


def cache() -> Iterator[Row]:
    for b, heads, kv_heads, length, d in ((1, 32, 8, 4096, 128), (16, 32, 8, 4096, 128), (1, 32, 8, 32768, 128)):
        q = torch.randn(b, heads, 1, d, device="cuda", dtype=torch.bfloat16)
        k, v = (torch.randn(b, kv_heads, length, d, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        exact = _attention(q[:1], k[:1], v[:1], False)
        held = KVCache(length)
        held.append(k, v)
        calls: Calls = {
            "torch SDPA bf16": [partial(F.scaled_dot_product_attention, q, k, v, enable_gqa=True)],
            "triton": [forced("triton", partial(held.attention, q))],
        }
        yield _row("cache", f"{b}x{heads}:{kv_heads}x{length}x{d}", calls, partial(_sums, exact))


def int4() -> Iterator[Row]:
    for n, k in ((4096, 4096), (11008, 4096)):
        weight = torch.randn(n, k) * 0.02
        packed = round_to_nearest(weight, Scheme.named("W4A16-g128").weights)
        dense, scale = packed.dequantize().cuda().double(), packed.scale.cuda()
        nibbles = [packed.qdata.cuda() for _ in range(turns(n * k / 2))]
        floats = [weight.cuda().bfloat16() for _ in range(turns(n * k * 2))]
        for m in (1, 16, 64, 512):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            exact = x[:64].double() @ dense.T
            calls: Calls = {"torch bf16": [partial(F.linear, x, w) for w in floats]}
            for label, bits in (("W4A16", None), ("W4A8", 8)):
                ours = partial(ops.int4_linear, x, weight_scale=scale, group_size=128, act_bits=bits)
                calls[label] = [forced("triton", partial(ours, weight=q)) for q in nibbles]
            yield _row("int4_linear", f"{m}x{k}x{n}", calls, partial(_norm, exact))


def sparse() -> Iterator[Row]:
    """2:4 and blocks at 75 %, int8 and bfloat16, beside torch's dense layer and its own 2:4."""
    n = k = 4096
    for pattern in ("2:4", "16x16"):
        linear = torch.nn.Linear(k, n, dtype=torch.bfloat16)
        sparsity = None if pattern == "2:4" else 0.75
        with torch.no_grad():
            linear.weight *= magnitude_mask(linear.weight, pattern, sparsity)
        layers: dict[str, torch.nn.Module] = {}
        for scheme in (None, "W8A8"):
            for layout in (f"gpu-{pattern}", "mma-2:4") if pattern == "2:4" and scheme else (f"gpu-{pattern}",):
                if layout.startswith("mma") and "cuda" not in BACKENDS:
                    continue
                name = f"{'bf16' if scheme is None else scheme} {layout}"
                layers[name] = SparseLinear.from_linear(copy.deepcopy(linear).cuda(), scheme, layout=layout)
        dense = linear.weight.detach().cuda()
        for m in (1, 16, 128, 2048):
            x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
            exact = x[:64].double() @ dense.double().T + linear.bias.cuda().double()
            calls: Calls = {"torch bf16": [partial(F.linear, x, dense, linear.bias.cuda())]}
            if pattern == "2:4":
                calls["torch 2:4"] = [gpu_peers.two_four(x, dense, linear.bias.cuda())]
            calls |= {name: [partial(layer, x)] for name, layer in layers.items()}
            yield _row("sparse", f"{m}x{k}x{n} {pattern}", calls, partial(_norm, exact))


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores.masked_fill_(torch.ones(scores.shape[-2:], device=q.device).triu(1).bool(), -math.inf)
    return torch.softmax(scores, -1) @ v


def torch_own(kind: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    with sdpa_kernel(kind):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def _norm(exact: torch.Tensor, y: torch.Tensor) -> float:
    """Of the first tokens, which `exact` has."""
    return ((y[: len(exact)].double() - exact).norm() / exact.norm()).item()


def _sums(exact: torch.Tensor, o: torch.Tensor) -> float:
    """Of the first heads, which `exact` has."""
    b, h = exact.shape[:2]
    return ((o[:b, :h].double() - exact).abs().sum() / exact.abs().sum()).item()


def _row(part: str, shape: str, calls: Calls, error: Callable[[torch.Tensor], float]) -> Row:
    row: Row = {"part": part, "shape": shape, "us": {}, "error": {}, "failed": {}}
    for name, turn in calls.items():
        try:
            row["us"][name] = round(seconds(turn) * 1e6, 1)
            row["error"][name] = error(turn[0]())
        except RuntimeError as reason:  # a kernel of torch's that does not take these arguments
            row["failed"][name] = str(reason)
    return row


PARTS = {
    "linear": linear, "attention": attention, "varlen": varlen, "cache": cache, "int4": int4, "sparse": sparse,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--part", choices=PARTS, action="append")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("gpu_ops: not run: no GPU")
    console, rows = Console(width=160), []
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, backends {BACKENDS}")
    with torch.inference_mode():
        for part in options.part or PARTS:
            for row in PARTS[part]():
                rows.append(row)
                errors = {name: f"{value:.4f}" for name, value in row["error"].items()}
                console.print(row["part"], row["shape"], "µs", row["us"], "error", errors, row["failed"] or "")
    if options.json:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "rows": rows}
        options.json.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
