"""The linear layers that are compared on a weight with zeros: those that leave them out, and dense ones."""

from __future__ import annotations

import warnings

import torch
from deepsparse_linear import deepsparse_fp32, deepsparse_int8
from linear_peer import LinearPeer, tcompress_linear, torch_fp32
from onnx_linear import onnxruntime_fp32, onnxruntime_int8
from peer import Call, CannotRun
from sparse import in_blocks
from sparse_peer import SparsePeer, ours_float, ours_int4, ours_int8

#: torch takes square blocks only, the largest first.
BSR_BLOCKS = (16, 4)


def _times(sparse: torch.Tensor, x: torch.Tensor, b: torch.Tensor) -> Call:
    """`F.linear` takes the same product, and does not run in inference mode."""
    return lambda: torch.sparse.mm(sparse, x.t()).t() + b


def torch_csr(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    """With 32-bit indices, which MKL reads as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sparse CSR is in beta
        csr = w.to_sparse_csr()
        crow, columns = csr.crow_indices().int(), csr.col_indices().int()
        return _times(torch.sparse_csr_tensor(crow, columns, csr.values(), csr.shape), x, b)


def torch_bsr(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    for size in BSR_BLOCKS:
        if in_blocks(w, size, size):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _times(w.to_sparse_bsr((size, size)), x, b)
    raise CannotRun(f"torch takes square blocks, and the zeros are not in such of {' or '.join(map(str, BSR_BLOCKS))}")


def torch_2_4(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sparse = torch.sparse.to_sparse_semi_structured(w)
    except RuntimeError as error:
        raise CannotRun(f"to_sparse_semi_structured: {error}") from error
    return lambda: torch.nn.functional.linear(x, sparse, b)


def scipy_csr(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> Call:
    """float32; on one thread, as scipy is."""
    from scipy.sparse import csr_matrix

    sparse, columns, bias = csr_matrix(w.numpy()), x.numpy().T, b.numpy()
    return lambda: torch.from_numpy((sparse @ columns).T + bias)


#: In the order of the table; the first is the baseline.
PEERS: dict[str, LinearPeer] = {
    "torch-fp32": LinearPeer(torch_fp32, 32),
    "torch-csr": SparsePeer(torch_csr, 32),
    "torch-bsr": SparsePeer(torch_bsr, 32),
    "torch-2:4": SparsePeer(torch_2_4, 32),
    "scipy-csr": SparsePeer(scipy_csr, 32),
    "onnxruntime-fp32": LinearPeer(onnxruntime_fp32, 32),
    "onnxruntime-int8": LinearPeer(onnxruntime_int8, 8),
    "deepsparse-fp32": SparsePeer(deepsparse_fp32, 32),
    "deepsparse-int8": SparsePeer(deepsparse_int8, 8),
    "tcompress-int8-dense": LinearPeer(tcompress_linear("int8"), 8),
    "tcompress-float-unstructured": SparsePeer(ours_float("unstructured"), 32),
    "tcompress-float-8x4": SparsePeer(ours_float("8x4"), 32),
    "tcompress-int8-1x4": SparsePeer(ours_int8("1x4"), 8),
    "tcompress-int8-8x4": SparsePeer(ours_int8("8x4"), 8),
    "tcompress-int8-2:4": SparsePeer(ours_int8("2:4"), 8),
    "tcompress-int4-8x4": SparsePeer(ours_int4, 4, 0.2),
}
