"""The paths of processors that this one is not.

AVX-VNNI and AVX-512 VNNI: their files are compiled against SIMDe's intrinsics in plain C instead of the compiler's
(simde/immintrin.h), and path detection is told that the processor has everything (lacks.h). ARM: cross compiled, and
run by qemu. `.ci/run` installs what this needs where it can; without it the tests are skipped.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from kernel_build import CPU, FLAGS, HERE, KERNELS, KERNELS_TEST, compile_all, host_compiler, link

EMULATED = (
    "attention_avx512vnni",
    "int4_linear_avx512vnni",
    "int8_linear_avxvnni",
    "int8_linear_avx512vnni",
    "quantize_per_token_avx2",
    "quantize_per_token_avx512",
    "sparse_linear_avxvnni",
    "sparse_linear_avx512vnni",
)
WITH_DOT_PRODUCT, WITHOUT = "neoverse-n1", "cortex-a72"


def _check(done: subprocess.CompletedProcess[str], paths: list[str]) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert [line.split()[1] for line in done.stdout.splitlines() if line.startswith("ran ")] == paths
    assert " 0 failures" in done.stdout


@pytest.fixture(scope="module")
def simde() -> list[str]:
    """Flags with which the compiler takes SIMDe's intrinsics for its own."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the rest of these builds is x86's")
    header = "#include <simde/x86/avx512.h>"
    probe = [host_compiler(), "-E", "-x", "c++", "-"]
    if subprocess.run(probe, input=header, capture_output=True, text=True).returncode != 0:
        pytest.skip("SIMDe is not installed (Debian: libsimde-dev)")
    return ["-I", str(HERE / "simde")]


def _build_conversions(compiler: str, headers: dict[str, str], flags: list[str], folder: Path) -> str:
    """`headers`: the header of each vector class by the name that conversions_test.cpp gives it."""
    objects = compile_all(compiler, [HERE / "conversions_test.cpp"], FLAGS, folder)
    for name, header in headers.items():
        defined = [f"-DCONVERSIONS={name}", f'-DVEC_HEADER="{header}"']
        objects += compile_all(compiler, [HERE / "conversions.cpp"], [*flags, *defined], folder / name)
    return link(compiler, objects, [*FLAGS, "-static"], folder / "conversions_test")


def test_vnni_without_vnni(simde, tmp_path):
    compiler = host_compiler()
    flags = [*FLAGS, "-O0"]  # SIMDe's AVX-512 takes the optimizer longer than the test
    emulated = []
    for name in EMULATED:
        lines = (CPU / f"{name}.cpp").read_text().splitlines(keepends=True)
        kept = [line for line in lines if "#pragma GCC target" not in line]
        assert len(kept) == len(lines) - 1
        emulated.append(tmp_path / f"{name}.cpp")
        emulated[-1].write_text("".join(kept))
    rest = [source for source in KERNELS if source.stem not in (*EMULATED, "path")]
    objects = compile_all(compiler, emulated, [*flags, *simde], tmp_path)
    code = subprocess.run(["objdump", "-d", *objects], capture_output=True, text=True, check=True).stdout
    assert "%xmm" in code
    assert "%ymm" not in code
    assert "%zmm" not in code
    objects += compile_all(compiler, [CPU / "path.cpp"], [*flags, "-include", str(HERE / "lacks.h")], tmp_path)
    objects += compile_all(compiler, [*KERNELS_TEST, *rest], flags, tmp_path)
    program = link(compiler, objects, flags, tmp_path / "kernels_test")
    paths = ["avxvnni", "avx512vnni"]
    _check(subprocess.run([program, "--few", *paths], capture_output=True, text=True), paths)


def test_conversions_without_avx(simde, tmp_path):
    headers = {"kScalar": "vec_scalar.h", "kAvx2": "vec_avx2.h", "kAvx512Vnni": "vec_avx512.h"}
    program = _build_conversions(host_compiler(), headers, [*FLAGS, "-O1", *simde], tmp_path)
    done = subprocess.run([program, "avx2", "avx512vnni"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checked ") == 2


# ---- ARM ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def arm():
    """(compiler, a function that runs a program on a processor of a name)."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no cross compiler (Debian: g++-aarch64-linux-gnu)")
    emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if emulator is None:
        pytest.skip("no emulator (Debian: qemu-user-static)")

    def run(processor: str, *command: str, path: str = "") -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"TCOMPRESS_CPU_PATH": path}
        return subprocess.run([emulator, "-cpu", processor, *command], capture_output=True, text=True, env=environment)

    return compiler, run


@pytest.fixture(scope="module")
def arm_kernels(arm, tmp_path_factory):
    compiler, _ = arm
    folder = tmp_path_factory.mktemp("arm")
    objects = compile_all(compiler, [*KERNELS_TEST, *KERNELS], FLAGS, folder)
    return link(compiler, objects, [*FLAGS, "-static"], folder / "kernels_test")


@pytest.mark.parametrize("extent", [["--few"], pytest.param([], marks=pytest.mark.slow)], ids=["few", "all"])
def test_neon(arm, arm_kernels, extent):
    _check(arm[1](WITH_DOT_PRODUCT, arm_kernels, *extent), ["scalar", "neon"])


def test_neon_is_left_alone_without_the_dot_product(arm, arm_kernels):
    _check(arm[1](WITHOUT, arm_kernels, "--few"), ["scalar"])


def test_detection_on_arm(arm, tmp_path):
    compiler, run = arm
    objects = compile_all(compiler, [HERE / "path_probe.cpp", CPU / "path.cpp"], ["-std=c++17", "-O0"], tmp_path)
    program = link(compiler, objects, ["-static"], tmp_path / "path_probe")

    def report(processor: str, path: str = "") -> dict[str, str]:
        return dict(line.split(": ", 1) for line in run(processor, program, path=path).stdout.splitlines())

    able, unable = report(WITH_DOT_PRODUCT), report(WITHOUT)
    assert able["scalar"] == able["neon"] == unable["scalar"] == ""
    assert able["avx2"] == able["amx"] == "not built: the compiler does not target x86-64"
    assert unable["neon"] == "this processor does not report asimddp"
    assert (able["current"], unable["current"]) == ("neon", "scalar")
    assert report(WITH_DOT_PRODUCT, "scalar")["current"] == "scalar"
    assert report(WITHOUT, "neon")["error"].endswith("expected a usable path; this processor does not report asimddp")


def test_conversions_on_arm(arm, tmp_path):
    compiler, run = arm
    program = _build_conversions(compiler, {"kScalar": "vec_scalar.h", "kNeon": "vec_neon.h"}, FLAGS, tmp_path)
    done = run(WITH_DOT_PRODUCT, program, "scalar", "neon")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("checked ") == 2
