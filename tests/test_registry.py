"""Meta-tests: nothing is registered by half, and the house keeps its own rules."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from tcompress.kernels.triton.bindings import KERNELS

import tcompress.ops
from tcompress import backend, cuda_backend
from tcompress.ops._registry import OPS, Op

ROOT = Path(__file__).parent.parent
CPU = ROOT / "csrc" / "cpu"
INSTRUCTION_SET_FILES = sorted(p for p in CPU.glob("*.cpp") if "#pragma GCC target" in p.read_text())
SOURCES = [
    p
    for folder in ("tcompress", "kernels", "csrc", "benchmarks", "tests")
    for p in (ROOT / folder).rglob("*")
    if p.suffix in (".py", ".cpp", ".h", ".cu", ".cuh")
]


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_op_is_complete(op: Op):
    schema = torch.ops.tcompress.__getattr__(op.name).default._schema
    names = [a.name for a in schema.arguments]
    for function in (op.reference, op.fake):
        assert list(inspect.signature(function).parameters) == names, function
    for function in (op.flops, op.nbytes):
        parameters = inspect.signature(function).parameters.values()
        leading = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
        assert leading == names[: len(leading)], function
    assert op.tolerance >= 0
    public = getattr(tcompress.ops, op.name)
    assert public.__name__ == op.name
    assert op.name in tcompress.ops.__all__
    for part in ("Args:", "Returns:", "Raises:"):
        assert part in public.__doc__, part


@pytest.mark.parametrize("op", OPS.values(), ids=list(OPS))
def test_op_has_its_tests(op: Op):
    text = (ROOT / "tests" / "ops" / f"test_{op.name}.py").read_text()
    assert op.name in text
    assert "reference" in text, "compared with the reference"
    assert op.name in (ROOT / "tests" / "ops" / "test_dispatch.py").read_text(), "opcheck"


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_kernel_is_reached(op: str):
    expected = ["triton"] * (op in KERNELS) + ["cuda"] * (op in cuda_backend.UNSUPPORTED) + ["cpu"]
    assert list(backend.kernels(op)) == expected
    keys = torch._C._dispatch_dump(f"tcompress::{op}")
    assert re.search(r"^CPU:", keys, flags=re.M), "the extension has no kernel for it"


@pytest.mark.parametrize("op", KERNELS)
def test_triton_kernel_is_complete(op: str):
    schema = getattr(torch.ops.tcompress_triton, op).default._schema
    assert str(schema) == str(getattr(torch.ops.tcompress, op).default._schema).replace("tcompress", "tcompress_triton")
    names = [a.name for a in schema.arguments]
    run, unsupported, path = KERNELS[op]
    assert list(inspect.signature(run).parameters) == names
    parameters = inspect.signature(unsupported).parameters.values()
    leading = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert leading == names[: len(leading)]
    assert path is None or list(inspect.signature(path).parameters) == names
    assert f'"{op}"' in (ROOT / "tests" / "gpu" / "test_triton_ops.py").read_text(), "compared with the reference"


def test_torch_stays_out_of_the_kernels():
    for path in CPU.iterdir():
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10|pybind11|Python)", path.read_text()), path


@pytest.mark.parametrize("path", INSTRUCTION_SET_FILES, ids=lambda p: p.name)
def test_instruction_set_files_include_nothing_inline(path: Path):
    """An inline function compiled here for AVX could be the copy that the linker keeps for everyone."""
    headers, seen = [path], set()
    while headers:
        text = headers.pop().read_text()
        for name in re.findall(r"#include\s*[<\"]([^>\"]+)", text):
            if (CPU / name).exists():
                if name not in seen:
                    headers.append(CPU / name)
                seen.add(name)
            else:
                assert name in ("immintrin.h", "arm_neon.h", "cstdint"), f"{path.name} reaches <{name}>"
    for name in seen:
        text = (CPU / name).read_text()
        without_anonymous = re.sub(r"namespace \{.*?\n\}  // namespace\n", "", text, flags=re.S)
        assert not re.search(r"^(inline|template)", without_anonymous, flags=re.M), f"{name} has linkable inline code"
    first = path.read_text()
    assert first.index("#pragma GCC target") < first.index("#include")


def test_every_path_has_a_test_and_a_line_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    for path in tcompress._extension.C.all_paths():
        assert path in readme


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path):
    assert len(path.read_text().splitlines()) <= 450


def test_design_notes_are_numbered():
    numbers = [p.name[:3] for p in sorted((ROOT / "docs" / "design").glob("*.md"))]
    assert numbers == [f"{i + 1:03}" for i in range(len(numbers))]
