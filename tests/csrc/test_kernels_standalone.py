"""Builds the torch-free kernels alone and runs them between guard pages, and under the sanitizers."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FLAGS = ["-std=c++17", "-O2", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-w"]


@pytest.mark.parametrize(
    "sanitizer",
    [None, pytest.param("undefined", marks=pytest.mark.slow), pytest.param("address", marks=pytest.mark.slow)],
)
def test_between_guard_pages(tmp_path, sanitizer):
    compiler = shutil.which("g++")
    assert compiler, "the extension could not have been built without it"
    flags = FLAGS + ([f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"] if sanitizer else [])
    sources = [Path(__file__).parent / "kernels_test.cpp", *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    objects = [tmp_path / f"{source.stem}.o" for source in sources]
    jobs = [
        subprocess.Popen([compiler, *flags, "-I", str(ROOT / "csrc" / "cpu"), "-c", str(source), "-o", str(target)])
        for source, target in zip(sources, objects, strict=True)
    ]
    assert [job.wait() for job in jobs] == [0] * len(jobs)
    program = tmp_path / "kernels_test"
    subprocess.run([compiler, *flags, *map(str, objects), "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "0 failures" in done.stdout
