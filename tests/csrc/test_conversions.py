"""Builds and runs the test of the float16 and bfloat16 conversions of every vector class."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

from tcompress import _C

HERE = Path(__file__).parent
CPU = HERE.parent.parent / "csrc" / "cpu"
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", "-fno-math-errno", "-w", "-I", str(CPU)]
CLASSES = {"scalar": ("kScalar", "vec_scalar.h", [])}  # name of what conversions.cpp exports, header, definitions
if platform.machine() in ("x86_64", "AMD64"):
    CLASSES["avx2"] = ("kAvx2", "vec_avx2.h", ["-DTARGET_AVX2"])
    CLASSES["avx512vnni"] = ("kAvx512Vnni", "vec_avx512.h", ["-DTARGET_AVX512"])
elif platform.machine() in ("aarch64", "arm64"):
    CLASSES["neon"] = ("kNeon", "vec_neon.h", [])


def test_conversions(tmp_path):
    compiler = shutil.which("g++")
    assert compiler, "the extension could not have been built without it"
    jobs = {"conversions_test": [str(HERE / "conversions_test.cpp")]}
    for path, (name, header, definitions) in CLASSES.items():
        defined = [f"-DCONVERSIONS={name}", f'-DVEC_HEADER="{header}"', *definitions]
        jobs[path] = [str(HERE / "conversions.cpp"), *defined]
    running = [
        subprocess.Popen([compiler, *FLAGS, "-c", *arguments, "-o", str(tmp_path / f"{job}.o")])
        for job, arguments in jobs.items()
    ]
    assert [process.wait() for process in running] == [0] * len(jobs)
    program = str(tmp_path / "conversions_test")
    subprocess.run([compiler, *(str(tmp_path / f"{job}.o") for job in jobs), "-o", program], check=True)
    usable = [path for path in CLASSES if not _C.why_not_usable(path)]
    done = subprocess.run([program, *usable], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checked ") == len(usable)
