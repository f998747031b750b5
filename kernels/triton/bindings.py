"""The ops in Triton: what the kernels take, and how an op's arguments reach them.

As `csrc/bindings.cpp` for the compiled kernels, this file, `bindings_int4` and `bindings_sparse` know the ops'
signatures. They do not import Triton until a kernel runs. `KERNELS` maps an op to functions of the op's arguments: one
that runs it, and one that says why it cannot, or None. The latter may be asked with fewer arguments than the op has.

Nothing here waits for the GPU or looks at data, so all of it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import bindings_int4, bindings_sparse
from .kernel_binding import Kernel, Maybe
from .reasons import IN_CPU_LAYOUT, MAX_HEAD

Triple = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


# ---- quantize_per_token ---------------------------------------------------------------------------------------------


def quantize_per_token(x: torch.Tensor, bits: int, symmetric: bool) -> Triple:
    from .quantize_tokens import quantize_tokens

    *leading, k = x.shape
    q, scale, zero_point = quantize_tokens(x.reshape(_tokens(x), k), bits, symmetric)
    q = q[:, :k].contiguous().view(x.shape)
    return q if symmetric else q.view(torch.uint8), scale.view(*leading, 1), zero_point.view(*leading, 1)


def quantize_per_token_unsupported(x: torch.Tensor, bits: int = 8, symmetric: bool = True) -> str | None:
    if bits > 7 and not symmetric:
        return f"bits={bits}, symmetric=False: the Triton kernel has at most 7 bits with a zero point"
    return None


# ---- int8_linear and its relatives ----------------------------------------------------------------------------------


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: Maybe,
    kernel_weight: Maybe,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_dtype: torch.dtype | None,
    residual: Maybe = None,
) -> torch.Tensor:
    if act_symmetric:
        from .linear import linear

        return linear(x, weight, weight_scale, bias, None, act_bits, True, activation, out_dtype, residual)
    a, scale = _integers(x, act_bits, act_symmetric)
    return _multiply(x, a, scale, weight, weight_scale, bias, activation, out_dtype or x.dtype, residual)


def int8_linear_quantized(
    q: torch.Tensor,
    scale: torch.Tensor,
    zero_point: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: Maybe,
    kernel_weight: Maybe,
    activation: str,
    out_dtype: torch.dtype,
    residual: Maybe,
) -> torch.Tensor:
    from .linear_quantized import centred

    tokens = _tokens(q)
    a = q.reshape(tokens, q.shape[-1]).contiguous()
    if q.dtype == torch.uint8:
        a = centred(a, zero_point.reshape(tokens, 1))
    scale = scale.reshape(tokens).contiguous()
    return _multiply(q, a, scale, weight, weight_scale, bias, activation, out_dtype, residual)


def int8_linear_requantize(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: Maybe,
    kernel_weight: Maybe,
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    out_bits: int,
    out_symmetric: bool,
) -> Triple:
    operands = (x, weight, weight_scale, bias, kernel_weight)
    y = int8_linear(*operands, act_bits, act_symmetric, activation, torch.float32)
    return quantize_per_token(y, out_bits, out_symmetric)


def int8_multi_linear(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    weight_scales: Sequence[torch.Tensor],
    biases: Sequence[Maybe],
    kernel_weights: Sequence[Maybe],
    act_bits: int,
    act_symmetric: bool,
    activation: str,
    gated: bool,
    out_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    dtype = out_dtype or x.dtype
    a, scale = _integers(x, act_bits, act_symmetric)

    def part(i: int, activation: str, dtype: torch.dtype) -> torch.Tensor:
        return _multiply(x, a, scale, weights[i], weight_scales[i], biases[i], activation, dtype)

    if gated:
        return [(part(0, activation, dtype).float() * part(1, "none", torch.float32)).to(dtype)]
    return [part(i, activation, dtype) for i in range(len(weights))]


def int8_linear_unsupported(x: torch.Tensor, weight: Maybe, *args: object, **kwargs: object) -> str | None:
    return IN_CPU_LAYOUT if weight is None else None


def int8_linear_quantized_unsupported(
    q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, weight: Maybe, *args: object, **kwargs: object
) -> str | None:
    return IN_CPU_LAYOUT if weight is None else None


def int8_linear_requantize_unsupported(
    x: torch.Tensor,
    weight: Maybe,
    weight_scale: torch.Tensor,
    bias: Maybe = None,
    kernel_weight: Maybe = None,
    act_bits: int = 8,
    act_symmetric: bool = True,
    activation: str = "none",
    out_bits: int = 8,
    out_symmetric: bool = True,
) -> str | None:
    return int8_linear_unsupported(x, weight) or quantize_per_token_unsupported(x, out_bits, out_symmetric)


def int8_multi_linear_unsupported(
    x: torch.Tensor, weights: Sequence[Maybe], *args: object, **kwargs: object
) -> str | None:
    return IN_CPU_LAYOUT if any(w is None for w in weights) else None


def _tokens(x: torch.Tensor) -> int:
    return x.shape[:-1].numel()


def _integers(x: torch.Tensor, bits: int, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of x as int8 without a zero point, and their scales [M]."""
    from .linear_quantized import centred
    from .quantize_tokens import quantize_tokens

    q, scale, zero_point = quantize_tokens(x.reshape(_tokens(x), x.shape[-1]), bits, symmetric)
    return q if symmetric else centred(q, zero_point[:, None]), scale


def _multiply(
    x: torch.Tensor,
    a: torch.Tensor,
    scale: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: Maybe,
    activation: str,
    dtype: torch.dtype,
    residual: Maybe = None,
) -> torch.Tensor:
    """The product in the leading axes of x."""
    from .linear_quantized import multiply

    n = weight.shape[0]
    residual = None if residual is None else residual.reshape(_tokens(x), n)
    y = multiply(a, scale, weight, weight_scale, bias, activation, dtype, residual)
    return y.view(*x.shape[:-1], n)


# ---- attention ------------------------------------------------------------------------------------------------------


def quantized_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Maybe,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .attention import attention

    causal = right == 0
    return attention(q, k, v, mask, bottom_right, causal, scale, return_lse, None, left, right, softcap, bits=bits)


def quantized_attention_unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: Maybe = None,
    bits: int = 8,
    *options: object,
) -> str | None:
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD:
        return f"a head of more than {MAX_HEAD}"
    return None


def quantized_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    bits: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .attention_varlen import attention_varlen

    offsets = (cu_seqlens_q, cu_seqlens_k)
    return attention_varlen(q, k, v, *offsets, bottom_right, left, right, softcap, scale, return_lse, bits=bits)


def quantized_attention_varlen_unsupported(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: Maybe = None,
    cu_seqlens_k: Maybe = None,
    bits: int = 8,
    *options: object,
) -> str | None:
    return quantized_attention_unsupported(q, k, v, None, bits)


def kv_cache_attention(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    mask: Maybe,
    length: int,
    head_dim_v: int,
    bottom_right: bool,
    left: int,
    right: int,
    softcap: float,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    from .decode import kv_cache_attention

    cache = (k_data, k_scale, v_data, v_scale, k_mean)
    return kv_cache_attention(
        q, *cache, mask, length, head_dim_v, bottom_right, left, right, softcap, scale, return_lse
    )


def kv_cache_attention_unsupported(
    q: torch.Tensor,
    k_data: torch.Tensor,
    k_scale: torch.Tensor,
    v_data: torch.Tensor,
    v_scale: torch.Tensor,
    k_mean: torch.Tensor,
    mask: Maybe = None,
    length: int = 0,
    head_dim_v: int = 0,
    *options: object,
) -> str | None:
    return f"a head of more than {MAX_HEAD}" if max(q.shape[3], head_dim_v) > MAX_HEAD else None


KERNELS = {
    "quantize_per_token": Kernel(quantize_per_token, quantize_per_token_unsupported),
    "int8_linear": Kernel(int8_linear, int8_linear_unsupported),
    "int8_linear_quantized": Kernel(int8_linear_quantized, int8_linear_quantized_unsupported),
    "int8_linear_requantize": Kernel(int8_linear_requantize, int8_linear_requantize_unsupported),
    "int8_multi_linear": Kernel(int8_multi_linear, int8_multi_linear_unsupported),
    "int4_linear": Kernel(
        bindings_int4.int4_linear, bindings_int4.int4_linear_unsupported, bindings_int4.int4_linear_path
    ),
    "int4_multi_linear": Kernel(bindings_int4.int4_multi_linear, bindings_int4.int4_multi_linear_unsupported),
    "kv_cache_attention": Kernel(kv_cache_attention, kv_cache_attention_unsupported),
    "quantized_attention": Kernel(quantized_attention, quantized_attention_unsupported),
    **bindings_sparse.KERNELS,
    "quantized_attention_varlen": Kernel(quantized_attention_varlen, quantized_attention_varlen_unsupported),
}
