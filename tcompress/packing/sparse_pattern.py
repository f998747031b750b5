"""What the zeros of a sparse weight look like."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tcompress.errors import message

#: The longest side of a block, and the largest M of N:M.
MAX_SIZE = 64


@dataclass(frozen=True)
class Pattern:
    """A pattern of zeros in a weight [N, K].

    ::

        "unstructured"   any element may be zero
        "2:4", "N:M"     of each M consecutive elements of a row at most N are not zero, 1 ≤ N < M ≤ 64
        "8x4", "RxC"     blocks of R outputs x C inputs, from the first element on, are zero as a whole; 1 ≤ R, C ≤ 64

    2:4 is the pattern of Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv 2104.08378, section 3.

    Attributes:
        kind: "unstructured", "n_m" or "blocks".
        size: (N, M) or (R, C); (1, 1) if unstructured.

    Raises:
        ValueError: a size out of its range.
    """

    kind: str
    size: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        first, second = self.size
        if self.kind == "unstructured":
            good = self.size == (1, 1)
        elif self.kind == "n_m":
            good = 1 <= first < second <= MAX_SIZE
        else:
            good = self.kind == "blocks" and 1 <= first <= MAX_SIZE and 1 <= second <= MAX_SIZE
        if not good:
            raise ValueError(message("Pattern", "size", f"{self.kind} {self.size}", _EXPECTED))

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """The pattern that a recipe writes as "unstructured", "2:4" or "8x4".

        Raises:
            TypeError: not a string. ValueError: not a pattern.
        """
        if not isinstance(text, str):
            raise TypeError(message("Pattern", "pattern", type(text).__name__, "a string"))
        if text == "unstructured":
            return cls("unstructured")
        match = re.fullmatch(r"([1-9][0-9]?)([:x])([1-9][0-9]?)", text, re.ASCII)
        if match is None:
            raise ValueError(message("Pattern", "pattern", repr(text), _EXPECTED))
        return cls("n_m" if match[2] == ":" else "blocks", (int(match[1]), int(match[3])))

    def __str__(self) -> str:
        if self.kind == "unstructured":
            return self.kind
        return f"{self.size[0]}{':' if self.kind == 'n_m' else 'x'}{self.size[1]}"


_EXPECTED = f'"unstructured", "N:M" with 1 ≤ N < M ≤ {MAX_SIZE} or "RxC" with R and C from 1 to {MAX_SIZE}'
