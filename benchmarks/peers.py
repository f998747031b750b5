"""The ops that are compared and the linear layers of each, by name.

A peer runs in a process of its own (`run.py` starts one each): idle worker threads of another library spin and slow
whoever is timed beside them. All peers get the same float32 weight, bias and input.
"""

from __future__ import annotations

import int4_peers
import int8_peers
from peer import FLOATS, Peer

#: op -> peer's name -> peer
OPS: dict[str, dict[str, Peer]] = {"int8_linear": int8_peers.PEERS, "int4_linear": int4_peers.PEERS}
BASELINE = next(iter(FLOATS))
