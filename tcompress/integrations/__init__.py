"""Other libraries: `transformers`' attention and cache.

`import tcompress` makes the attention "tcompress" known to transformers, now if transformers is loaded, else as soon as
it is (see `import_hook`); `register` does it by hand. `Int8Cache` loads transformers at first use.
"""

from __future__ import annotations

from typing import Any

from tcompress.integrations.transformers_attention import register

__all__ = ["Int8Cache", "register"]


def __getattr__(name: str) -> Any:
    if name == "Int8Cache":
        from tcompress.integrations.transformers_cache import Int8Cache

        return Int8Cache
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
