"""Which paths the extension reports, against what the kernel of the operating system says about the processor."""

from __future__ import annotations

from pathlib import Path

import pytest

import tcompress
from tcompress._extension import C

NEEDS = {
    "scalar": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avxvnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
}
NEEDS["amx"] = NEEDS["avx512vnni"] | {"amx_tile", "amx_int8"}
NEEDS["neon"] = {"asimddp"}


def _flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):  # x86, ARM
            return set(line.split(":")[1].split())
    return set()


def test_usable_paths_are_those_of_the_processor():
    assert list(NEEDS) == C.all_paths()
    for path, needs in NEEDS.items():
        assert (C.why_not_usable(path) == "") == (needs <= _flags()), path


def test_the_highest_usable_path_is_taken():
    with tcompress.use_cpu_path(None):
        assert C.current_path() == [p for p in C.all_paths() if not C.why_not_usable(p)][-1]


def test_forcing():
    with tcompress.use_cpu_path("scalar"):
        assert C.current_path() == C.forced_path() == "scalar"
    with pytest.raises(ValueError, match="cpu path: name: got 'sse9', expected one of scalar, avx2"):
        C.force_path("sse9")
    for path in C.all_paths():
        if C.why_not_usable(path):
            with pytest.raises(RuntimeError, match="does not report|not built"):
                C.force_path(path)


def test_threads_are_torchs():
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert C.num_threads() == 1
    finally:
        torch.set_num_threads(before)
