"""Options of the benchmarks, and the cases of those files that name an `OP`."""

from __future__ import annotations

import pytest
from peers import OPS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer", action="append", default=[], help="a name in peers.OPS; default: torch's and ours")
    parser.addoption("--shape", action="append", default=[], help="part of a shape's name")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.config.getoption("--shape")
    op = OPS[metafunc.module.OP]
    shapes = [s for s in op.shapes if not wanted or any(part in str(s) for part in wanted)]
    in_process = [name for name in op.peers if name.startswith(("torch-", "tcompress-"))]
    peers = metafunc.config.getoption("--peer") or in_process
    cases = [(shape, peer) for shape in shapes for peer in peers]
    metafunc.parametrize(("shape", "peer"), cases, ids=[f"{shape}-float32-{peer}" for shape, peer in cases])
