"""Loads the C++ extension, or remembers why it could not be loaded."""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

from tcompress.errors import ReferencePathWarning


def _load() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("tcompress._C"), ""
    except ModuleNotFoundError as error:
        if error.name != "tcompress._C":
            raise
        return None, "the C++ extension is not built; reinstall with TCOMPRESS_REQUIRE_EXT=1 to see why"
    except ImportError as error:  # built, but for another torch or another C library
        reason = f"the C++ extension does not load: {error}"
        warnings.warn(f"tcompress: {reason}", ReferencePathWarning, stacklevel=2)
        return None, reason


#: The extension module (host functions: paths, threads), or None. Importing it registers the CPU kernels.
C, WHY_NOT = _load()
