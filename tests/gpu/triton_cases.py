"""Sets Triton's interpreter up, or skips the module that asks for it."""

from __future__ import annotations

import os
import sys

import pytest
import torch


def require() -> None:
    """Call before the kernels are imported. The interpreter is for the whole process, so it is not forced on a
    machine with a GPU."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        if torch.cuda.is_available():
            pytest.skip("set TRITON_INTERPRET=1 to run Triton's interpreter here", allow_module_level=True)
        if "triton" in sys.modules:
            pytest.skip("triton was imported before, without its interpreter", allow_module_level=True)
        os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton", reason="triton is not installed")
    import interpreter  # noqa: F401  makes bfloat16 right


def require_compiler() -> None:
    """For tests that compile in another process: Triton has to be there, and where others want its interpreter it
    has to be on before Triton is imported here."""
    if "triton" not in sys.modules and not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    pytest.importorskip("triton", reason="triton is not installed")
