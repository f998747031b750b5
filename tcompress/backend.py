"""Which backend runs an op, and why.

Python picks the *backend* (`reference`, `cpu`, `triton`, `cuda`); the C++ extension picks the *path* of the CPU backend
(`scalar`, `avx2`, `avxvnni`, `avx512vnni`, `amx`; on ARM `neon`). Both can be forced, by `use_backend` and
`use_cpu_path` or by the environment (`TCOMPRESS_BACKEND`, `TCOMPRESS_CPU_PATH`), and `explain` says why one was taken.
A forced backend that cannot run raises. The automatic choice skips a kernel only for a reason that the kernel declared.

Compiled kernels are `tcompress::<op>` under the dispatch key of their device; a Triton kernel, which may share a device
with them, is an op of its own, `tcompress_triton::<op>`, with the same schema and fake.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple, NoReturn

import torch

from tcompress import _extension
from tcompress.errors import ReferencePathWarning, message

#: In order of preference; `reference` runs everything and comes last. Triton before CUDA C++: on an H100 it was faster
#: at every size measured (docs/gpu.md).
BACKENDS = ("triton", "cuda", "cpu", "reference")

Unsupported = Callable[..., str | None]
#: What torch.library itself enters when no gradient is wanted; not public, and a release without it is merely slower.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)


@dataclass(frozen=True)
class Candidate:
    """One line of an explanation: a backend, or a path of the CPU backend, and what became of it."""

    name: str
    chosen: bool
    reason: str


class Resolved(NamedTuple):
    """What a public function runs on its arguments: an op with the arguments of its schema. Or, where `instead` says
    why, something else than an op, which `op` names."""

    op: str
    args: tuple[Any, ...]
    instead: str = ""


@dataclass(frozen=True)
class Explanation:
    """What `explain` returns; `str()` gives a table."""

    op: str
    backend: str
    path: str | None
    candidates: tuple[Candidate, ...]

    def __str__(self) -> str:
        width = max(len(c.name) for c in self.candidates)
        lines = [f"{self.op}: {self.backend}" + (f" ({self.path})" if self.path else "")]
        lines += [f"  {'*' if c.chosen else ' '} {c.name:{width}}  {c.reason or 'chosen'}" for c in self.candidates]
        return "\n".join(lines)


_kernels: dict[str, dict[str, Unsupported]] = {}
_paths: dict[tuple[str, str], Unsupported] = {}
_references: dict[str, Callable[..., Any]] = {}
_resolvers: dict[str, Callable[..., Resolved]] = {}
_forced: str | None = None
_warned = False


def register_kernel(op: str, backend: str, *, unsupported: Unsupported, path: Unsupported | None = None) -> None:
    """Declares that `backend` has a kernel for `op`, registered with torch's dispatcher under `tcompress::op`.

    Args:
        op: name of the op, without the namespace.
        backend: one of `BACKENDS`, except `reference`.
        unsupported: called with the op's arguments; returns the reason why the kernel cannot take them, or None.
        path: likewise; returns by which way the backend runs them, where that is for `explain` to say.
    """
    if backend not in BACKENDS or backend == "reference":
        raise ValueError(message("register_kernel", "backend", repr(backend), f"one of {BACKENDS[:-1]}"))
    known = _kernels.get(op, {}) | {backend: unsupported}
    _kernels[op] = {b: known[b] for b in BACKENDS if b in known}
    if path is not None:
        _paths[op, backend] = path


def register_reference(op: str, reference: Callable[..., Any]) -> None:
    """Declares the plain torch reference of `op`: it defines the numbers and runs on every device."""
    _references[op] = reference


def register_resolver(op: str, resolve: Callable[..., Resolved]) -> None:
    """Declares that the public function `op` has other arguments than the op, or may run another one: `resolve`, called
    with its arguments, says which. It is asked by `explain` alone."""
    _resolvers[op] = resolve


def kernels(op: str) -> tuple[str, ...]:
    """The backends that have a kernel for `op`, in order of preference."""
    return tuple(_kernels.get(op, {}))


def _checked_backend(name: str | None, where: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(message(where, "name", repr(name), f"one of {BACKENDS}"))
    return name


_forced = _checked_backend(os.environ.get("TCOMPRESS_BACKEND") or None, "TCOMPRESS_BACKEND")


def forced() -> str | None:
    """The backend that is forced, or None."""
    return _forced


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Forces a backend inside the `with` block, in all threads; None returns to the automatic choice.

    Raises:
        ValueError: the name is not one of `BACKENDS`.
        RuntimeError: later, from an op that the backend cannot run.
    """
    global _forced
    previous, _forced = _forced, _checked_backend(name, "use_backend")
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def use_cpu_path(name: str | None) -> Iterator[None]:
    """Forces a path of the CPU kernels (`avx2`, `neon`, …: `tcompress info`) inside the `with` block, in all threads.

    Raises:
        ValueError: unknown name. RuntimeError: this processor lacks the instructions, or the extension is not built.
    """
    global _path
    if _extension.C is None:
        raise RuntimeError(message("use_cpu_path", "name", repr(name), "a CPU path", _extension.WHY_NOT))
    previous = _extension.C.forced_path()
    _extension.C.force_path(name or "")
    _path = _extension.C.current_path()
    try:
        yield
    finally:
        _extension.C.force_path(previous)
        _path = _extension.C.current_path()


def _path_at_import() -> str | None:
    try:
        return None if _extension.C is None else _extension.C.current_path()
    except (ValueError, RuntimeError):  # TCOMPRESS_CPU_PATH is wrong: `cpu_path` raises when it is asked
        return None


#: Kept here because torch.compile cannot look into the extension, but compiles anew when a variable has changed.
_path = _path_at_import()


def cpu_path() -> str | None:
    """The path in force, or None where the extension is not built."""
    return _path if _path is not None or _extension.C is None else _extension.C.current_path()


def select(op: str, *args: Any, **kwargs: Any) -> str:
    """The backend that runs `op` on these arguments.

    Raises:
        RuntimeError: the forced backend has no kernel for `op`, or cannot take the arguments.
    """
    available = _kernels.get(op, {})
    if _forced is not None and _forced != "reference":
        unsupported = available.get(_forced)
        reason = "it has no kernel for this op" if unsupported is None else unsupported(*args, **kwargs)
        if reason is not None:
            raise RuntimeError(message(op, "backend", f"{_forced!r} (forced)", "a backend that can run", reason))
        return _forced
    if _forced is None:
        for backend, unsupported in available.items():  # in order of preference
            if unsupported(*args, **kwargs) is None:
                return backend
        if _extension.C is None and not _warned:
            _warn_once(op)
    return "reference"


def kernel_for(op: str, *args: Any) -> str | None:
    """As `select`, but None instead of the reference, and instead of an error where the forced backend cannot run."""
    names = kernels(op) if _forced is None else (_forced,)
    able = (name for name in names if name in _kernels.get(op, {}) and _kernels[op][name](*args) is None)
    return next(able, None)


def _warn_once(op: str) -> None:
    global _warned
    if not torch.compiler.is_compiling():
        _warned = True
        warnings.warn(f"{op}: runs on the slow torch reference: {_extension.WHY_NOT}", ReferencePathWarning, 3)


def call(op: str, *args: Any) -> Any:
    """Runs `op` on the selected backend. Arguments are positional, in the order of the schema."""
    chosen = select(op, *args)
    if chosen == "reference":
        return _Reference.apply(op, *args)
    run = _dispatched(op, chosen)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return run(*args)
    with _below_autograd():  # torch would find in Python, in seven microseconds, that no_grad wants no gradient
        return run(*args)


def call_in_place(op: str, *args: Any) -> None:
    """`call` for an op that changes its arguments, which take no part in a gradient."""
    chosen = select(op, *args)
    if chosen == "reference":
        _references[op](*args)
    else:
        _dispatched(op, chosen)(*args)


@cache
def _dispatched(op: str, backend: str) -> Callable[..., Any]:
    """torch's callable for an op; looking it up takes longer than a small op."""
    return getattr(torch.ops.tcompress_triton if backend == "triton" else torch.ops.tcompress, op).default


class _Reference(torch.autograd.Function):
    """A reference outside torch's dispatcher. Its plain torch would record a gradient of the scales alone, which is
    wrong without a sign of it; backward raises, as it does for the op itself.
    """

    @staticmethod
    def forward(ctx: Any, op: str, *args: Any) -> Any:
        ctx.op = op
        result = _references[op](*args)
        return tuple(result) if isinstance(result, list) else result  # torch does not look into a list

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(no_backward(ctx.op))


def no_backward(op: str) -> str:
    """What every op says when it is differentiated."""
    hint = "call it under torch.inference_mode() or detach its inputs"
    return message(op, "backward", "a gradient", "inference only", hint)


def explain(op: str | Callable[..., Any] | torch.nn.Module, *args: Any, **kwargs: Any) -> Explanation:
    """Lists every candidate for `op` on these arguments with "chosen" or the reason why it was passed over.

    Args:
        op: a public op such as `tcompress.ops.int8_linear`, or its name; or a module that chose between kernels by
            measuring them, `tcompress.nn.SparseLinear`.
        args, kwargs: the arguments that the op would get.

    Returns:
        The candidates; its `op` is another one where the public op runs that on these arguments.

    Raises:
        ValueError: no such op. RuntimeError: the forced backend cannot run.
    """
    if isinstance(op, torch.nn.Module):
        own = getattr(op, "explain", None)
        if own is None:
            raise ValueError(message("explain", "op", type(op).__name__, "an op, or a module that chooses its kernel"))
        explanation: Explanation = own()
        return explanation
    name = op if isinstance(op, str) else op.__name__
    if name not in _references:
        raise ValueError(message("explain", "op", repr(name), f"one of {sorted(_references)}"))
    if name in _resolvers:
        resolved = _resolvers[name](*args, **kwargs)
        if resolved.instead:
            return _explain_instead(name, resolved)
        name, args, kwargs = resolved.op, resolved.args, {}
    chosen = select(name, *args, **kwargs)
    candidates: list[Candidate] = []
    for backend in BACKENDS:
        if backend == chosen:
            reason = "chosen: forced" if backend == _forced else "chosen"
        elif _forced is not None:
            reason = f"passed over: {_forced} is forced"
        elif backend == "reference":
            reason = "passed over: a kernel is faster"
        elif backend not in _kernels.get(name, {}):
            reason = "no kernel for this op yet"
        else:
            reason = _kernels[name][backend](*args, **kwargs) or f"passed over: {chosen} is preferred"
        candidates.append(Candidate(backend, backend == chosen, reason))
        if backend == "cpu" and _extension.C is not None and chosen == "cpu":
            candidates += _explain_paths(_extension.C)
    path = cpu_path()
    if chosen != "cpu":
        path = _paths[name, chosen](*args, **kwargs) if (name, chosen) in _paths else None
    return Explanation(name, chosen, path, tuple(candidates))


def _explain_instead(name: str, resolved: Resolved) -> Explanation:
    """Of a public function that runs no op: what it runs, and the kernels that it has."""
    chosen = Candidate(resolved.op, True, f"chosen: {resolved.instead}")
    others = [
        Candidate(b, False, _kernels[name][b](*resolved.args) or "passed over: slower where measured")
        for b in kernels(name)
    ]
    return Explanation(name, resolved.op, None, (chosen, *others))


def _explain_paths(extension: Any) -> Iterator[Candidate]:
    current, forced = extension.current_path(), extension.forced_path()
    for path in reversed(extension.all_paths()):
        reason = extension.why_not_usable(path)
        if path == current:
            reason = "chosen: forced" if forced else "chosen: the highest usable path"
        elif not reason:
            reason = f"usable; {forced} is forced" if forced else f"usable; {current} is higher"
        yield Candidate(f"cpu/{path}", path == current, reason)
