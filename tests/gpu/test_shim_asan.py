"""The emulated kernels under the address sanitizer: reads and writes stay inside the tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import shim_library

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shim_library.compiler() is None, reason="g++ is not installed"),
]


@pytest.fixture(scope="module")
def library() -> Path:
    return shim_library.build(shim_library.cache_folder(), "-fsanitize=address", "-O1", "-g")


def run(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    gxx = shim_library.compiler()
    assert gxx
    runtime = subprocess.run([gxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    env = {**os.environ, "LD_PRELOAD": runtime.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}
    env["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    command = [sys.executable, str(HERE / "asan_cases.py"), str(library), *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True)


def test_right_kernels_are_silent(library):
    done = run(library)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished" in done.stdout


def test_a_tensor_too_short_is_seen(library):
    done = run(library, "short")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
