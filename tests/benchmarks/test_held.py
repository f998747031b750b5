"""Holding all libraries to AVX2."""

from __future__ import annotations

import os
import sys

import held
import onnx_call
import pytest
from peer import CannotRun
from run import machine


def test_the_process_starts_anew_once(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.setattr(os, "environ", {"PATH": "/bin"})
    monkeypatch.setattr(os, "execv", lambda *call: started.append(call))
    held.apply(False)
    assert held.isa() is None
    held.apply(True)
    assert held.isa() == "avx2"
    assert os.environ.items() >= held.AVX2.items()
    held.apply(True)
    assert started == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


def test_what_cannot_be_held_does_not_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(held.MARK, "avx2")
    with pytest.raises(CannotRun, match="takes no limit"):
        onnx_call.session(b"")


def test_the_page_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("run.read_bandwidth", lambda: 1.0)
    assert "held_to" not in machine("avx2")
    monkeypatch.setenv(held.MARK, "avx2")
    assert machine("avx2")["held_to"] == "avx2"
