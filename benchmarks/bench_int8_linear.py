"""int8 linear layers. `python benchmarks/run.py` (make bench) runs each peer in a process of its own; plain
`pytest benchmarks/bench_int8_linear.py` runs torch and ours in one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peers import PEERS
from shapes import LINEAR_SHAPES, LinearShape

IN_PROCESS = [name for name in PEERS if not name.startswith("onnxruntime")]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.config.getoption("--shape")
    shapes = [s for s in LINEAR_SHAPES if not wanted or any(part in str(s) for part in wanted)]
    peers = metafunc.config.getoption("--peer") or IN_PROCESS
    cases = [(shape, peer) for shape in shapes for peer in peers]
    metafunc.parametrize(("shape", "peer"), cases, ids=[f"{shape}-float32-{peer}" for shape, peer in cases])


def test_int8_linear(benchmark: Any, shape: LinearShape, peer: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape.m, shape.k, generator=generator)
    w = torch.randn(shape.n, shape.k, generator=generator) / shape.k**0.5
    b = torch.randn(shape.n, generator=generator)
    benchmark.group = f"int8_linear/{shape}/float32"
    linear = PEERS[peer](x, w, b)
    with torch.inference_mode():
        expected = x.double() @ w.double().t() + b.double()
        error = float((linear().double() - expected).norm() / expected.norm())
        benchmark.pedantic(linear, rounds=_rounds(shape), warmup_rounds=5)
    benchmark.extra_info |= {
        "peer": peer,
        "shape": str(shape),
        "macs": shape.macs,
        "relative_error": error,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "path": _path(),
    }
    assert error < 0.05, "a wrong fast kernel must not make it into a table"


def _rounds(shape: LinearShape) -> int:
    """About half a second at 50 GMAC/s, within bounds."""
    return max(11, min(2000, int(0.5 * 50e9 / shape.macs)))


def _path() -> str:
    from tcompress.backend import cpu_path

    return cpu_path() or "reference"
