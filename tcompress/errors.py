"""Warnings and the form of error messages: `op: argument: got X, expected Y; hint`."""

from __future__ import annotations


class ReferencePathWarning(RuntimeWarning):
    """A kernel's plain torch reference runs because the C++ extension is missing: right, but slow."""


class CompressionWarning(UserWarning):
    """Compression did less than asked, or made something worse; the report says what."""


def message(where: str, argument: str, got: object, expected: object, hint: str = "") -> str:
    """Formats `where: argument: got X, expected Y; hint`."""
    return f"{where}: {argument}: got {got}, expected {expected}" + (f"; {hint}" if hint else "")
