"""Weights out of an ONNX file that torch exported, under the names of the module that was exported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch


class OnnxWeights:
    """The initializers of a graph.

    Attributes:
        named: those that kept their parameter's name after `prefix`, without it, and the weights of linear layers. A
            linear layer's weight was folded into an unnamed transposed initializer of its MatMul, whose name still has
            the path of the module: "/backbone/encoder/layer.0/.../dense/MatMul".
        rest: all others, constants that were folded.
    """

    def __init__(self, file: Path, prefix: str) -> None:
        import onnx  # an extra, which a test run need not have
        from onnx import numpy_helper

        graph = onnx.load(file).graph
        arrays = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
        self.named = {name.removeprefix(prefix): _tensor(a) for name, a in arrays.items() if name.startswith(prefix)}
        used = set()
        for node in graph.node:
            if node.op_type == "MatMul" and node.input[1] in arrays:
                path = node.name.strip("/").rpartition("/")[0].replace("/", ".")
                self.named[path[path.find("encoder") :] + ".weight"] = _tensor(arrays[node.input[1]]).T.contiguous()
                used.add(node.input[1])
        self.rest = [_tensor(a) for name, a in arrays.items() if not name.startswith(prefix) and name not in used]

    def one(self, shape: tuple[int, ...], but: torch.Tensor | None = None) -> torch.Tensor:
        """The one constant of a shape, which is not equal to `but`."""
        found = [t for t in self.rest if t.shape == shape and (but is None or not torch.equal(t, but))]
        if len(found) != 1:
            raise ValueError(f"onnx: constants of shape {shape}: got {len(found)}, expected 1")
        return found[0]


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(array.copy())
