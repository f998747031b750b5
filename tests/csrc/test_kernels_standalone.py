"""Builds the torch-free kernels alone and runs them between guard pages, and under the sanitizers."""

from __future__ import annotations

import subprocess

import pytest
from kernel_build import FLAGS, KERNELS, KERNELS_TEST, compile_all, host_compiler, link


@pytest.mark.parametrize(
    "sanitizer",
    [None, pytest.param("undefined", marks=pytest.mark.slow), pytest.param("address", marks=pytest.mark.slow)],
)
def test_between_guard_pages(tmp_path, sanitizer):
    flags = FLAGS + ([f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else [])
    objects = compile_all(host_compiler(), [*KERNELS_TEST, *KERNELS], flags, tmp_path)
    program = link(host_compiler(), objects, flags, tmp_path / "kernels_test")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " 0 failures" in done.stdout
