"""Packaging: the kernels folder, and what happens when the extension cannot be built."""

from __future__ import annotations

import os
import site
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _setup(tmp_path: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py with all outputs under tmp_path."""
    command = [sys.executable, "setup.py", "-q", "build", f"--build-base={tmp_path / 'build'}", *args]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True)


def test_kernels_is_a_subpackage():
    import tcompress.kernels

    assert tcompress.kernels.__name__ == "tcompress.kernels"


def test_broken_compiler_leaves_a_pure_python_package(tmp_path):
    done = _setup(tmp_path, CXX="/bin/false", CC="/bin/false", TCOMPRESS_REQUIRE_EXT="0")
    assert done.returncode == 0, done.stderr
    assert "the C++ extension was NOT built" in done.stderr
    names = [p.name for p in (tmp_path / "build").rglob("*")]
    assert "compress.py" in names
    assert "int8.yaml" in names
    assert not any(name.startswith("_C") for name in names)
    assert list((tmp_path / "build").rglob("tcompress/kernels/__init__.py"))


def test_broken_compiler_is_an_error_where_the_extension_is_required(tmp_path):
    done = _setup(tmp_path, CXX="/bin/false", CC="/bin/false", TCOMPRESS_REQUIRE_EXT="1")
    assert done.returncode != 0


def test_extension_can_be_left_out(tmp_path):
    done = _setup(tmp_path, TCOMPRESS_NO_EXT="1", CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    assert "NOT built" not in done.stderr


@pytest.mark.slow
def test_demo_runs_without_the_extension(tmp_path):
    assert _setup(tmp_path, TCOMPRESS_NO_EXT="1").returncode == 0
    (library,) = (tmp_path / "build").glob("lib*")
    # -S: the .pth file of an editable installation would find this checkout's extension
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(library), *site.getsitepackages()])}
    command = [sys.executable, "-S", "-m", "tcompress", "demo", "--seconds", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ReferencePathWarning" in done.stderr
    assert "slow torch reference" in done.stdout
