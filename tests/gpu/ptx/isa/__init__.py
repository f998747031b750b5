"""The instructions. Importing a module registers its decoders."""

from . import (
    arithmetic,
    asynchronous,
    convert,
    floating,
    integer,
    logic,
    matrix,
    matrix_access,
    memory_access,
    warp,
    warpgroup,
)

__all__ = [
    "arithmetic",
    "asynchronous",
    "convert",
    "floating",
    "integer",
    "logic",
    "matrix",
    "matrix_access",
    "memory_access",
    "warp",
    "warpgroup",
]
