"""What modules with a compressed weight have in common: the weight is held once, and saved in its storage layout."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from tcompress.nn.kernel_layout import KernelWeight, kernel_weight
from tcompress.packing import PackedWeight
from tcompress.quantize.scheme import Scheme

_SAVED = {"qdata": "weight_packed", "scale": "weight_scale", "zero_point": "weight_zero_point"}


class PackedModule(nn.Module):
    """Base of modules that hold a `PackedWeight` or, in its place, the layout that a compiled kernel reads.

    The state dict holds `weight_packed`, `weight_scale` and, where there are zero points, `weight_zero_point`,
    whichever of the two is in memory. What goes to another device is the storage layout, and the kernel layout of that
    device, if its kernel has one, is derived there.

    Buffers: qdata, scale, zero_point (of the storage layout) or kernel_weight (with scale, in layout "dense").
    """

    qdata: torch.Tensor | None
    scale: torch.Tensor | None
    zero_point: torch.Tensor | None
    kernel_weight: torch.Tensor | None
    _kernel: KernelWeight | None
    #: Whether the module's forward takes the kernel layout of its own accord.
    _wants_kernel_layout = True

    def __init__(self, shape: tuple[int, int], scheme: Scheme, device: torch.device | str | None) -> None:
        super().__init__()
        self._shape, self.scheme = shape, scheme
        for name in (*_SAVED, "kernel_weight"):
            self.register_buffer(name, None, persistent=False)
        self._hold(_empty(shape, scheme, device))

    def _hold(self, packed: PackedWeight, kernel: KernelWeight | None = None) -> None:
        """Takes a weight: in the kernel layout if there is one, else in the storage layout."""
        if kernel is None and self._wants_kernel_layout:
            kernel = kernel_weight(packed, self.scheme.activations is None)
        if kernel is None:
            self.qdata, self.scale, self.zero_point = packed.qdata, packed.scale, packed.zero_point
            self.kernel_weight = self._kernel = None
        else:
            self._hold_kernel(kernel)

    def _hold_kernel(self, kernel: KernelWeight) -> None:
        self.qdata = self.zero_point = None
        self.scale, self.kernel_weight = kernel.scale, kernel.data
        # Not the tensors: those are buffers, which torch moves and copies.
        self._kernel = kernel.without_tensors()

    @property
    def held_kernel(self) -> KernelWeight | None:
        """The kernel layout that is held, or None."""
        if self._kernel is None or self.kernel_weight is None:
            return None
        return self._kernel.with_tensors(self.kernel_weight, self.scale)

    @property
    def packed(self) -> PackedWeight:
        """The weight in its storage layout: the module's own tensors, or new ones where it holds the kernel layout."""
        kernel = self.held_kernel
        if kernel is not None:
            return kernel.unpack()
        assert self.qdata is not None
        assert self.scale is not None
        group_size = self.scheme.weights.group_size or max(self._shape[1], 1)
        if self.scheme.weights.bits > 4:
            return PackedWeight(self.qdata, self.scale, self._shape)
        return PackedWeight(self.qdata, self.scale, self._shape, "int4", self.zero_point, group_size)

    @property
    def weight_packed(self) -> torch.Tensor:
        """The stored integers (`PackedWeight.qdata`)."""
        return self.packed.qdata

    @property
    def weight_scale(self) -> torch.Tensor:
        """The scales (`PackedWeight.scale`)."""
        return self.packed.scale if self.scale is None else self.scale

    @property
    def weight_zero_point(self) -> torch.Tensor | None:
        """The zero points (`PackedWeight.zero_point`), or None."""
        return self.packed.zero_point

    def _device(self) -> torch.device:
        held = self.qdata if self.kernel_weight is None else self.kernel_weight
        assert held is not None
        return held.device

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> PackedModule:
        device = self._device()
        new_device = fn(torch.empty(0, dtype=torch.uint8, device=device)).device
        if new_device != device and self.kernel_weight is not None:
            packed = self.packed
            self.qdata, self.scale, self.zero_point = packed.qdata, packed.scale, packed.zero_point
            self.kernel_weight = self._kernel = None
        scale = self.scale
        super()._apply(fn, recurse)
        if scale is not None and self.scale is not None and self.scale.dtype != scale.dtype:
            self.scale = scale.to(self.scale.device)  # .half() and .bfloat16() must not round the scales
        if new_device != device:
            self._hold(self.packed)
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        packed = _saved_form(self, destination)
        for field, name in _SAVED.items():
            tensor = getattr(packed, field)
            if tensor is not None:
                destination[prefix + name] = tensor if keep_vars else tensor.detach()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        # For torch's loader, which checks, copies or assigns, the storage layout stands among the buffers for a moment.
        packed = self.packed
        names = {field: name for field, name in _SAVED.items() if getattr(packed, field) is not None}
        self._buffers |= {name: getattr(packed, field) for field, name in names.items()}
        try:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        finally:
            loaded: dict[str, Any] = {field: self._buffers.pop(name) for field, name in names.items()}
            layout = {"layout": packed.layout, "group_size": packed.group_size}
            self._hold(PackedWeight(shape=self._shape, **loaded, **layout))  # type: ignore[arg-type]


def share_kernel_layout(modules: Iterable[PackedModule]) -> None:
    """Makes modules with one and the same weight hold one kernel layout, if any of them holds it.

    Rows of an int4 weight are not looked up in the kernel layout: such an embedding keeps the storage layout.
    """
    modules = list(modules)
    kernel = next((m.held_kernel for m in modules if m.held_kernel is not None), None)
    if kernel is not None:
        for module in modules:
            if module._wants_kernel_layout or kernel.layout == "dense":
                module._hold_kernel(kernel)


def _empty(shape: tuple[int, int], scheme: Scheme, device: torch.device | str | None) -> PackedWeight:
    """A weight of zeros."""
    (n, k), args = shape, scheme.weights
    if args.bits > 4:
        qdata = torch.zeros(shape, dtype=torch.int8, device=device)
        return PackedWeight(qdata, torch.ones(n, dtype=torch.float32, device=device), shape)
    size = args.group_size or max(k, 1)
    groups = (n, -(-k // size))
    qdata = torch.full((n, (k + 1) // 2), 0x88, dtype=torch.uint8, device=device)
    scale = torch.ones(groups, dtype=getattr(torch, args.scale_dtype), device=device)
    zero_point = None if args.symmetric else torch.full(groups, 8, dtype=torch.uint8, device=device)
    return PackedWeight(qdata, scale, shape, "int4", zero_point, size)


#: What a state_dict() has unpacked, by the id of the dict that it hands from module to module.
_unpacked: dict[int, list[tuple[weakref.ref[torch.Tensor], PackedWeight]]] = {}


def _saved_form(module: PackedModule, destination: Any) -> PackedWeight:
    """The storage layout; the same tensors for modules that share a kernel layout, so that they are saved once."""
    if module.kernel_weight is None:
        return module.packed
    if id(destination) not in _unpacked:
        _unpacked[id(destination)] = []
        weakref.finalize(destination, _unpacked.pop, id(destination), None)
    for kernel, packed in _unpacked[id(destination)]:
        if kernel() is module.kernel_weight:
            return packed
    packed = module.packed
    _unpacked[id(destination)].append((weakref.ref(module.kernel_weight), packed))
    return packed
