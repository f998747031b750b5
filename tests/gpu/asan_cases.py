"""`python asan_cases.py LIBRARY [short]`: every emulated kernel once, under the address sanitizer (preloaded).

Every tensor is an allocation of its own, so a read or write beyond it is seen. `short` leaves the last row of a weight
out, which must be seen.
"""

from __future__ import annotations

import sys

import torch
from shim_library import Library

library = Library(sys.argv[1])
library.order = "random"
rows = 30 if "short" in sys.argv[2:] else 31
weight = torch.randint(-128, 128, (31, 80), dtype=torch.int8)[:rows].clone()
x = torch.randn(19, 77)
q, scale, _ = library.quantize_per_token(x, ldq=80)
y = torch.empty(19, 31)
for tile in range(1, 4):
    library.call(
        "int8_linear", q, weight, scale, torch.ones(31), None, None, None, None, y, 19, 31, 77, 80, 80, 0, 0, 4, tile
    )
library.pad_rows(torch.zeros(3, 77, dtype=torch.int8))

half = torch.float16
for d, dv, mask in ((64, 64, None), (72, 130, torch.randn(1, 2, 70, 67, dtype=half)), (40, 33, None)):
    heads = [torch.randn(1, h, s, w, dtype=half) for h, s, w in ((2, 70, d), (1, 67, d), (1, 67, dv))]
    library.attention(*heads, mask, causal=True)

packed = torch.randint(0, 256, (33, 50), dtype=torch.uint8)
scales, zeros = torch.rand(33, 4), torch.randint(0, 16, (33, 4), dtype=torch.uint8)
for m in (3, 20):
    library.int4_linear(torch.randn(m, 99, dtype=half), packed, scales, zeros, 32)
print("finished")
