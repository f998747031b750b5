"""Building of the CUDA extension: choices of setup_cuda, and that it loads on a torch for the CPU alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

import setup_cuda  # noqa: E402


@pytest.fixture
def nvcc_found(monkeypatch, tmp_path):
    """An nvcc under CUDA_HOME."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "nvcc").touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    return str(tmp_path / "bin" / "nvcc")


@pytest.fixture
def no_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)


def test_zero_builds_nothing(monkeypatch, nvcc_found):
    monkeypatch.setenv("TCOMPRESS_CUDA", "0")
    assert setup_cuda.wanted() is None


def test_one_builds_or_raises(monkeypatch, nvcc_found):
    monkeypatch.setenv("TCOMPRESS_CUDA", "1")
    assert setup_cuda.wanted() == nvcc_found


def test_one_without_nvcc_raises(monkeypatch, no_nvcc):
    monkeypatch.setenv("TCOMPRESS_CUDA", "1")
    with pytest.raises(RuntimeError, match="no nvcc"):
        setup_cuda.wanted()


def test_auto_without_nvcc_builds_nothing(monkeypatch, no_nvcc):
    monkeypatch.delenv("TCOMPRESS_CUDA", raising=False)
    assert setup_cuda.wanted() is None


@pytest.mark.parametrize("version", [None, "13.0"])
def test_auto_asks_whether_torch_has_cuda(monkeypatch, nvcc_found, version):
    import torch

    monkeypatch.delenv("TCOMPRESS_CUDA", raising=False)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(setup_cuda, "GPU", Path("/nowhere"))
    assert setup_cuda.wanted() == (nvcc_found if version else None)


def test_unknown_choice_raises(monkeypatch):
    monkeypatch.setenv("TCOMPRESS_CUDA", "maybe")
    with pytest.raises(ValueError, match="expected 0, 1 or auto"):
        setup_cuda.wanted()


def test_architectures():
    flags = setup_cuda.architecture_flags("80; 90a")
    assert flags[:2] == ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90a,code=sm_90a"]
    assert flags[2] == "-gencode=arch=compute_90a,code=compute_90a"
    for wrong in ("", "ampere", "80,90"):
        with pytest.raises(ValueError, match="TCOMPRESS_CUDA_ARCH_LIST"):
            setup_cuda.architecture_flags(wrong)


def test_kernels_know_no_torch():
    for path in (ROOT / "csrc" / "cuda").iterdir():
        if not path.name.startswith("binding"):
            text = path.read_text()
            assert "<torch/" not in text, path
            assert "<ATen/" not in text, path


@pytest.mark.slow
@pytest.mark.skipif(setup_cuda.find_nvcc() is None, reason="nvcc is not installed")
def test_extension_loads_and_registers(tmp_path):
    env = {**os.environ, "TCOMPRESS_CUDA": "1", "TCOMPRESS_CUDA_ARCH_LIST": "80", "PYTHONPATH": str(ROOT)}
    build = [sys.executable, str(Path(__file__).parent / "build_cuda_extension.py"), str(tmp_path)]
    subprocess.run(build, env=env, check=True)
    (library,) = tmp_path.rglob("_C_cuda*.so")
    program = f"""
import importlib.util, torch, tcompress.cuda_backend
spec = importlib.util.spec_from_file_location("tcompress._C_cuda", {str(library)!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
for op in set(tcompress.cuda_backend.UNSUPPORTED) - {{"sparse_prepack", "sparse_unpack"}}:  # plain torch
    assert torch._C._dispatch_has_kernel_for_dispatch_key("tcompress::" + op, "CUDA"), op
"""
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
