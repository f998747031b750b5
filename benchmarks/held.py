"""Holds all libraries to AVX2, so that a machine with more compares them as one without it would."""

from __future__ import annotations

import argparse
import os
import sys

#: What the libraries read, each its own, most of them when they are loaded. oneDNN is in torch and in OpenVINO.
#: Not DeepSparse's NM_ARCH=avx2: it picks the library, which was still seen to generate AVX-512 and VNNI code.
AVX2 = {
    "TCOMPRESS_CPU_PATH": "avx2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
}
#: Our own mark: for peers that cannot be held, and for the title of a page.
MARK = "TCOMPRESS_BENCH_HELD"


def isa() -> str | None:
    """What this process and those that it starts are held to: "avx2", or None."""
    return os.environ.get(MARK) or None


def add_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--avx2", action="store_true", help="hold all libraries to AVX2; those that cannot are not run")


def apply(wanted: bool) -> None:
    """Starts this process anew where the limit is wanted and not yet set: loaded libraries have chosen already."""
    if wanted and isa() is None:
        os.environ.update({**AVX2, MARK: "avx2"})
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
