"""Path detection on processors that this one is not: each feature taken away in turn."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CPU = HERE.parent.parent / "csrc" / "cpu"
AVX2 = ("avx2", "fma", "f16c")
AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni")

pytestmark = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="these features are x86's")


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    compiler = shutil.which("g++")
    assert compiler, "the extension could not have been built without it"
    program = tmp_path_factory.mktemp("probe") / "path_probe"
    sources = [HERE / "path_probe.cpp", CPU / "path.cpp"]
    command = [compiler, "-std=c++17", "-O0", "-I", str(CPU), "-include", str(HERE / "lacks.h"), *map(str, sources)]
    subprocess.run([*command, "-o", str(program)], check=True)

    def run(lacks="", path=None):
        environment = {k: v for k, v in os.environ.items() if not k.startswith("TCOMPRESS_")} | {"LACKS": lacks}
        if path is not None:
            environment["TCOMPRESS_CPU_PATH"] = path
        lines = subprocess.run([str(program)], env=environment, capture_output=True, text=True, check=True).stdout
        pairs = [line.split(": ", 1) for line in lines.splitlines()]
        assert pairs[-1] == pairs[-2]  # the second call as the first
        return dict(pairs)

    return run


@pytest.mark.parametrize("feature", AVX2)
def test_a_processor_without_a_feature_of_avx2(probe, feature):
    result = probe(feature)
    assert result["scalar"] == ""
    for path in ("avx2", "avxvnni", "avx512vnni", "amx"):
        assert result[path] == f"this processor does not report {feature}"
    assert result["current"] == "scalar"


@pytest.mark.parametrize("feature", AVX512)
def test_a_processor_without_a_feature_of_avx512(probe, feature):
    result = probe(feature)
    assert result["scalar"] == result["avx2"] == result["avxvnni"] == ""
    for path in ("avx512vnni", "amx"):
        assert result[path] == f"this processor does not report {feature}"
    assert result["current"] == "avxvnni"


def test_avxvnni_is_needed_by_no_other_path(probe):
    result = probe("avxvnni")
    assert result["avxvnni"] == "this processor does not report avxvnni"
    assert result["avx2"] == result["avx512vnni"] == ""
    assert probe("avxvnni avx512f")["current"] == "avx2"


def test_a_processor_with_everything(probe):
    result = probe()
    assert result["scalar"] == result["avx2"] == result["avxvnni"] == result["avx512vnni"] == ""
    assert result["current"] == ("avx512vnni" if result["amx"] else "amx")


@pytest.mark.parametrize("path", ["avx2", "avxvnni", "avx512vnni", "amx"])
def test_forcing_a_path_that_cannot_run(probe, path):
    result = probe("fma", path)
    assert "current" not in result
    expected = f"cpu path: name: got '{path}', expected a usable path; this processor does not report fma"
    assert result["error"] == expected


def test_forcing_a_path_that_can_run(probe):
    assert probe("avx512f", "avx2")["current"] == "avx2"
    assert probe("avx2", "scalar")["current"] == "scalar"
    assert probe("avx2", "")["current"] == "scalar"
    assert probe("", "sse9")["error"].startswith("cpu path: name: got 'sse9', expected one of scalar, avx2, ")
