"""Drop-in for `torch.nn.Linear` with a weight of which most is zero."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from tcompress import backend, tune
from tcompress.errors import message
from tcompress.ops.int8_linear import ACTIVATIONS, check_residual
from tcompress.ops.quantize_per_token import FLOAT_DTYPES, check_float
from tcompress.ops.sparse_prepack import cpu_layouts, gpu_layouts, is_fixed
from tcompress.packing import SparseWeight, pack_sparse
from tcompress.quantize.rtn import round_to_nearest
from tcompress.quantize.scheme import Scheme
from tcompress.sparse_kernel import DENSE, SparseKernel, best_pattern, kernels_for
from tcompress.weights import linear_bias, linear_weight

_INDEX_KINDS = ("bitmap", "delta", "positions")


class SparseLinear(nn.Module):
    """`y = activation(x Wᵀ + b)` where most of W is zero and neither stored nor multiplied (`ops.sparse_linear`,
    `ops.int8_sparse_linear`).

    Called like `torch.nn.Linear`; inference only. The weight is saved in the pattern found in its zeros
    (`packing.SparseWeight`): `weight_values`, `weight_scale` (int8) and `weight_bitmap`, `weight_delta` or
    `weight_positions`. In memory it is held once, in the layout of the kernel that runs it. Which that is,
    `from_linear` measures on the weight's device; where zeros bring no speed it is the dense one, and only the file is
    smaller. A layout holds for the kind of device that it was chosen on: moved to another, the module measures there
    (`tune`), and moved back it takes its own again.

    Args:
        packed: the weight.
        bias: [N] or None.
        scheme: of an int8 weight, W8A8 or like; None for floats.
        layout: of the kernel: "dense", "8x4", "unstructured" (floats), "1x4" or "2:4" (int8); or one of a GPU's
            (`ops.sparse_prepack`).
        activation: applied to the result inside the kernel: "none", "relu", "gelu", "gelu_tanh", "silu".

    Raises:
        ValueError: a layout, activation or scheme that there is not, or a malformed index.
    """

    values: torch.Tensor | None
    index: torch.Tensor | None
    scale: torch.Tensor | None
    kernel_weight: torch.Tensor | None

    def __init__(
        self,
        packed: SparseWeight,
        bias: torch.Tensor | None = None,
        scheme: Scheme | None = None,
        layout: str = DENSE,
        activation: str = "none",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(message("SparseLinear", "activation", repr(activation), f"one of {ACTIVATIONS}"))
        if (packed.bits == 8) != (scheme is not None) or packed.bits == 4:
            got = f"{packed.bits}-bit values with {'no scheme' if scheme is None else scheme.name}"
            raise ValueError(message("SparseLinear", "packed, scheme", got, "int8 values with a scheme, or floats"))
        if scheme is not None:
            _check_scheme(scheme)
        of_gpu = gpu_layouts(packed.values.dtype)
        layouts = (DENSE, *cpu_layouts(torch.float32 if scheme is None else torch.int8), *of_gpu)
        if layout not in layouts:
            raise ValueError(message("SparseLinear", "layout", repr(layout), f"one of {layouts}"))
        self.out_features, self.in_features = packed.shape
        self.scheme, self.layout, self.activation = scheme, layout, activation
        #: An activation that `tcompress.fuse` moved here from the module after this one; not part of a checkpoint.
        self.fused_activation = "none"
        #: Why this layout was taken, if it was measured.
        self.choice: tune.Choice | None = None
        #: The kind of device that `layout` is for, and for how many tokens one is chosen on another.
        self._home = "cuda" if layout in of_gpu else "cpu"
        if packed.values.device.type != "meta":
            self._home = packed.values.device.type
        self._tokens = tune.TOKENS
        #: What was chosen on another device, where the weight is now.
        self._elsewhere: tune.Choice | None = None
        for name in ("values", "index", "scale", "kernel_weight"):
            self.register_buffer(name, None, persistent=False)
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
        self._hold(packed)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        scheme: str | Scheme | None = None,
        pattern: str = "auto",
        layout: str = "auto",
        tokens: int = tune.TOKENS,
    ) -> SparseLinear:
        """A sparse layer with the weight of a pruned one.

        Args:
            linear: with zeros in its weight, from whatever pruned it; one that `torch.nn.utils.prune` still masks, or
                `transformers`' Conv1D, will do.
            scheme: "int8", "W8A8" … quantizes by rounding to nearest; None keeps floats.
            pattern: in which the weight is saved; "auto" takes the smallest that its zeros have.
            layout: of the kernel; "auto" measures the candidates (`tcompress.tune`).
            tokens: the number of tokens that counts when measuring.

        Raises:
            ValueError: the weight holds NaN or infinity, or does not have the pattern; a scheme without 8-bit weights
                and quantized activations.
        """
        scheme = Scheme.named(scheme) if isinstance(scheme, str) else scheme
        module = cls.from_weight(linear_weight(linear), linear_bias(linear), scheme, pattern, layout, tokens)
        return module.train(linear.training)

    @classmethod
    def from_weight(
        cls,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        scheme: Scheme | None = None,
        pattern: str = "auto",
        layout: str = "auto",
        tokens: int = tune.TOKENS,
    ) -> SparseLinear:
        """`from_linear` for a weight [N, K], float32, bfloat16 or float16."""
        weight = weight.detach()
        if weight.dim() != 2:
            raise ValueError(message("SparseLinear", "weight", f"{weight.dim()} dimensions", "[N, K]"))
        check_float(weight, "SparseLinear", "weight")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(message("SparseLinear", "bias", list(bias.shape), f"[{weight.shape[0]}]"))
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(message("SparseLinear", "weight", "NaN or infinity", "finite values"))
        scale = None
        if scheme is not None:
            _check_scheme(scheme)
            quantized = round_to_nearest(weight, scheme.weights)
            stored, scale = quantized.qdata, quantized.scale
        else:
            stored = weight
        choice = None
        if layout == "auto":
            choice = tune.choose(stored, kernels_for(stored, scheme), tokens, weight.dtype)
        layout = choice.kernel.layout if choice else layout
        pattern = best_pattern(stored) if pattern == "auto" else pattern
        module = cls(pack_sparse(stored, pattern, scale=scale), bias, scheme, layout)
        module.choice, module._tokens = choice, tokens
        return module

    def _hold(self, packed: SparseWeight) -> None:
        """Takes a weight: in the kernel's layout, or as it is stored while it has no values (the meta device)."""
        if packed.values.device.type == "meta":
            self.values, self.index, self.kernel_weight = packed.values, packed.index, None
        else:
            dense = packed.floats() if self.scheme is None else packed.integers()  # raises before a change
            self._kernel, self._elsewhere = self._kernel_on_device(dense)
            self.values = self.index = None
            self.kernel_weight = self._kernel.prepack(dense)
        self.scale = packed.scale
        self._description = (packed.pattern, packed.bits, packed.index_kind, packed.values.dtype)
        #: What `weight` says; a cast of the module changes it, and not the values.
        self._dtype = packed.values.dtype

    def _kernel_on_device(self, dense: torch.Tensor) -> tuple[SparseKernel, tune.Choice | None]:
        """The kernel of `layout` on its own kind of device, or what is chosen on another; there with the choice."""
        kernels = kernels_for(dense, self.scheme)
        if len(kernels) == 1:  # no sparse kernel runs: the dense weight is multiplied
            return kernels[0], None
        usable = {kernel.layout: kernel for kernel in kernels}
        if is_fixed(self.layout) and not any(map(is_fixed, usable)):
            hint = "the weight does not have this pattern"
            raise ValueError(message("SparseLinear", "layout", repr(self.layout), f"one of {tuple(usable)}", hint))
        if self.layout in usable and dense.device.type == self._home:
            return usable[self.layout], None
        floats = [t.dtype for t in (self.bias, dense) if t is not None and t.dtype in FLOAT_DTYPES]
        choice = tune.choose(dense, kernels, self._tokens, floats[0] if floats else torch.float32)
        return choice.kernel, choice

    @property
    def pattern(self) -> str:
        """In which the weight is saved."""
        return self._description[0]

    @property
    def packed(self) -> SparseWeight:
        """The weight in its storage layout; new tensors, made from the kernel's layout."""
        pattern, bits, index_kind, dtype = self._description
        shape = (self.out_features, self.in_features)
        if self.kernel_weight is None:
            assert self.values is not None
            assert self.index is not None
            return SparseWeight(self.values, self.index, index_kind, shape, pattern, bits, self.scale)
        dense = self._kernel.unpack(self.kernel_weight, *shape)
        return pack_sparse(dense.to(dtype) if self.scheme is None else dense, pattern, scale=self.scale)

    @property
    def weight(self) -> torch.Tensor:
        """A stand-in of zeros with the weight's shape, device and type, as in `QuantizedLinear`; the weight itself is
        `packed.dequantize()`. After `half()` and the like the type is the new one, as a float layer's would be: models
        that cast their input to it must not be led astray."""
        held = self.values if self.kernel_weight is None else self.kernel_weight
        assert held is not None
        return torch.zeros((), dtype=self._dtype, device=held.device).expand(self.out_features, self.in_features)

    def forward(self, input: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """input: [..., K] float32, bfloat16 or float16. residual: [..., N] in its type, added to the result, or None.
        Returns [..., N] in the input's type."""
        if input.shape[-1:] != (self.in_features,):
            raise ValueError(message("SparseLinear", "input", list(input.shape), f"[..., {self.in_features}]"))
        if self.kernel_weight is None:
            raise RuntimeError(message("SparseLinear", "weight", "none (the meta device)", "a loaded weight"))
        # One layout must not take what another refuses.
        check_float(input, "SparseLinear", "input")
        check_residual("SparseLinear", residual, input, self.out_features, None)
        activation = self.activation if self.fused_activation == "none" else self.fused_activation
        return self._kernel(input, self.kernel_weight, self.out_features, self.scale, self.bias, activation, residual)

    def explain(self) -> backend.Explanation:
        """The layouts that were candidates, with their times, and which one runs."""
        if self.kernel_weight is None:
            raise RuntimeError(message("SparseLinear", "weight", "none (the meta device)", "a loaded weight"))
        running = self._kernel.layout
        runs_on = self._kernel.runs_on(self.kernel_weight, self.out_features, self.in_features)
        path = backend.cpu_path() if runs_on == "cpu" else None
        reasons: dict[str, str] = {}
        choice = self._elsewhere or self.choice
        if choice is not None:
            reasons = {
                layout: f"{seconds * 1e3:.4f} ms for {choice.tokens} tokens ({choice.source})"
                if seconds
                else choice.source
                for layout, seconds in sorted(choice.seconds.items(), key=lambda item: item[1])
            }
        if self._elsewhere is None:
            reasons.setdefault(self.layout, "given")
        if running not in reasons:
            reasons[running] = f"the layer was made where no kernel could run {self.layout}"
        candidates = tuple(backend.Candidate(layout, layout == running, why) for layout, why in reasons.items())
        return backend.Explanation("SparseLinear", runs_on, path, candidates)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        # .half() and .bfloat16() change neither values nor scales: they go to another device, or stay, as bytes.
        device = self.weight.device
        dtype = fn(torch.empty(0, dtype=self._dtype, device=device)).dtype
        new_device = fn(torch.empty(0, dtype=torch.uint8, device=device)).device
        moved = None
        if new_device != device:
            packed = self.packed
            tensors = {"values": packed.values, "index": packed.index, "scale": packed.scale}
            as_bytes = {name: fn(t.view(torch.uint8)).view(t.dtype) for name, t in tensors.items() if t is not None}
            moved = replace(packed, **as_bytes)
            if device.type == "meta":  # to_empty: what it gives is no index
                none = torch.zeros(packed.shape, dtype=packed.values.dtype, device=new_device)
                moved = pack_sparse(none, packed.pattern, scale=moved.scale)
        kept = {name: self._buffers[name] for name in ("scale", "kernel_weight", "values", "index")}
        for name in kept:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        self._buffers.update(kept)
        if moved is not None:
            self._hold(moved)
        self._dtype = dtype
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = self.packed
        destination[f"{prefix}weight_values"] = packed.values
        destination[f"{prefix}weight_{packed.index_kind}"] = packed.index
        if packed.scale is not None:
            destination[f"{prefix}weight_scale"] = packed.scale

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, torch.Tensor],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # The sizes depend on the zeros, so what is loaded takes the place of what is held.
        names = ("weight_values", "weight_scale", *(f"weight_{kind}" for kind in _INDEX_KINDS))
        given = {name: state_dict[prefix + name] for name in names if prefix + name in state_dict}
        own: dict[str, Any] = {k: v for k, v in state_dict.items() if k.removeprefix(prefix) not in names}
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        kinds = [kind for kind in _INDEX_KINDS if f"weight_{kind}" in given]
        unexpected_keys.extend(f"{prefix}weight_{kind}" for kind in kinds[1:])
        wanted = ["weight_values"] + (["weight_scale"] if self.scheme is not None else [])
        missing = [prefix + name for name in wanted if name not in given]
        missing += [] if kinds else [f"{prefix}weight_{self._description[2]}"]
        if missing:
            missing_keys.extend(missing if strict else [])
            return
        pattern, bits, _, _ = self._description
        shape = (self.out_features, self.in_features)
        try:
            device = self.weight.device if self.weight.device.type != "meta" else given["weight_values"].device
            values, index = given["weight_values"].to(device), given[f"weight_{kinds[0]}"].to(device)
            scale = given["weight_scale"].to(device) if "weight_scale" in given else None
            if scale is not None and not local_metadata.get("assign_to_params_buffers", False):
                scale = scale.clone()
            self._hold(SparseWeight(values, index, kinds[0], shape, pattern, bits, scale))
            self.choice = None  # it was another weight's
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{prefix}weight: {error}")

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        text += f", scheme={self.scheme.name if self.scheme else None}, pattern={self.pattern}, layout={self.layout}"
        activation = self.activation if self.fused_activation == "none" else self.fused_activation
        return text if activation == "none" else f"{text}, activation={activation}"


def _check_scheme(scheme: Scheme) -> None:
    """Raises unless a sparse layer computes it."""
    if scheme.weights.bits <= 4 or scheme.activations is None or scheme.static:
        expected = "5 to 8 bits for weights and activations quantized per token"
        raise ValueError(message("SparseLinear", "scheme", scheme.name, expected))
