"""Options of the benchmarks."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peer", action="append", default=[], help="a name in benchmarks/peers.py; default: all of torch")
    parser.addoption("--shape", action="append", default=[], help="part of a shape's name")
