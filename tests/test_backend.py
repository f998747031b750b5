"""Which backend and path run, how both are forced, and what `explain` says about it."""

import os
import subprocess
import sys

import pytest
import torch

from tcompress import _C, backend, explain, ops, use_backend, use_cpu_path

X = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randint(-128, 128, (17, 20), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
SCALE = torch.full((17,), 0.5)
USABLE = [path for path in _C.all_paths() if not _C.why_not_usable(path)]
UNUSABLE = [path for path in _C.all_paths() if _C.why_not_usable(path)]


def integers():
    return ops.int8_linear(X, WEIGHT, SCALE, out_dtype=torch.int32)


@pytest.fixture
def dummy_op(monkeypatch):
    """An op that only the registry knows; register kernels for it at will."""
    monkeypatch.setitem(backend._references, "dummy", lambda x: x)
    monkeypatch.setitem(backend._kernels, "dummy", {})
    return "dummy"


# ---- choice ---------------------------------------------------------------------------------------------------------


def test_cpu_is_chosen_on_the_cpu_and_the_reference_elsewhere():
    assert backend.select("int8_linear", X, WEIGHT, SCALE) == "cpu"
    assert backend.select("int8_linear", X.to("meta"), WEIGHT.to("meta"), SCALE.to("meta")) == "reference"
    assert backend.kernels("int8_linear") == ("triton", "cuda", "cpu")
    assert backend.kernels("unheard_of") == ()


def test_kernel_for_is_the_choice_without_the_reference():
    assert backend.kernel_for("int8_linear", X, WEIGHT, SCALE) == "cpu"
    assert backend.kernel_for("int8_linear", X.to("meta"), WEIGHT.to("meta"), SCALE.to("meta")) is None
    assert backend.kernel_for("unheard_of", X) is None
    for name, expected in (("cpu", "cpu"), ("reference", None), ("triton", None), ("cuda", None)):
        with use_backend(name):
            assert backend.kernel_for("int8_linear", X, WEIGHT, SCALE) == expected


def test_preference_does_not_depend_on_the_order_of_registration(dummy_op):
    reasons = dict.fromkeys(("cpu", "triton", "cuda"))
    for name in reasons:
        backend.register_kernel(dummy_op, name, unsupported=lambda x, name=name: reasons[name])
    assert backend.kernels(dummy_op) == ("triton", "cuda", "cpu")
    for expected in ("triton", "cuda", "cpu", "reference"):
        assert backend.select(dummy_op, X) == expected
        assert explain(dummy_op, X).backend == expected
        reasons[expected] = f"no {expected} today"
    shown = {c.name: c.reason for c in explain(dummy_op, X).candidates}
    assert shown["triton"] == "no triton today"
    assert shown["reference"] == "chosen"


def test_an_exception_in_a_check_propagates(dummy_op):
    def broken(x):
        raise ZeroDivisionError("broken check")

    backend.register_kernel(dummy_op, "cpu", unsupported=broken)
    with pytest.raises(ZeroDivisionError, match="broken check"):
        backend.select(dummy_op, X)
    with pytest.raises(ZeroDivisionError, match="broken check"):
        explain(dummy_op, X)


@pytest.mark.parametrize("name", ["reference", "opencl", ""])
def test_only_known_backends_register(dummy_op, name):
    with pytest.raises(ValueError, match=r"register_kernel: backend: got .* expected one of"):
        backend.register_kernel(dummy_op, name, unsupported=lambda x: None)


# ---- forced ---------------------------------------------------------------------------------------------------------


def test_forced_reference_gives_the_same_integers_and_runs_no_kernel():
    expected = integers()
    with use_backend("reference"):
        assert backend.select("int8_linear", X, WEIGHT, SCALE) == "reference"
        # A weight that no kernel would take shows that none was asked.
        got = ops.int8_linear(X, WEIGHT, SCALE, kernel_weight=torch.empty(0), out_dtype=torch.int32)
        assert torch.equal(got, expected)
        assert torch.equal(integers(), expected)
    with pytest.raises(RuntimeError, match="kernel_weight"):
        ops.int8_linear(X, WEIGHT, SCALE, kernel_weight=torch.empty(0), out_dtype=torch.int32)


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_backend_that_cannot_run_raises_the_reason(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # with it Triton would run on the CPU
    calls = (integers, lambda: ops.quantize_per_token(X), lambda: ops.int8_prepack(WEIGHT))
    with use_backend(name):
        for call in calls:
            with pytest.raises(RuntimeError, match=rf"'{name}' \(forced\), expected a backend that can run; ."):
                call()
        with pytest.raises(RuntimeError, match=rf"int8_linear: backend: got '{name}' \(forced\)"):
            explain("int8_linear", X, WEIGHT, SCALE)


def test_forced_cpu_on_another_device_raises_the_reason():
    with use_backend("cpu"), pytest.raises(RuntimeError, match="the input is on meta"):
        ops.quantize_per_token(X.to("meta"))


@pytest.mark.parametrize("name", ["CPU", "gpu", ""])
def test_unknown_backend(name):
    with pytest.raises(ValueError, match=f"use_backend: name: got '{name}', expected one of"), use_backend(name):
        pass
    assert backend._forced is None


def test_backend_is_restored():
    with use_backend("reference"):
        with use_backend("cpu"):
            assert backend.select("int8_linear", X) == "cpu"
            with use_backend(None):
                assert backend.select("int8_linear", X) == "cpu"
                assert backend.select("int8_linear", X.to("meta")) == "reference"
        assert backend.select("int8_linear", X) == "reference"
        with pytest.raises(KeyError), use_backend("cuda"):
            raise KeyError
        assert backend.select("int8_linear", X) == "reference"
    assert backend.select("int8_linear", X) == "cpu"


@pytest.mark.parametrize("path", USABLE)
def test_forced_path_runs(path):
    expected = integers()
    with use_cpu_path(path):
        assert backend.cpu_path() == path
        assert torch.equal(integers(), expected)


def test_highest_usable_path_is_the_automatic_choice():
    assert backend.cpu_path() == USABLE[-1]
    assert USABLE[0] == "scalar"
    with use_cpu_path("scalar"), use_cpu_path(None):
        assert backend.cpu_path() == USABLE[-1]


def test_unknown_path():
    with pytest.raises(ValueError, match="got 'sse9', expected one of scalar, "), use_cpu_path("sse9"):
        pass
    with pytest.raises(ValueError, match="sse9"):
        _C.why_not_usable("sse9")
    assert backend.cpu_path() == USABLE[-1]


def test_path_is_restored():
    with use_cpu_path("scalar"):
        with pytest.raises(KeyError), use_cpu_path(USABLE[-1]):
            raise KeyError
        assert backend.cpu_path() == "scalar"
        with pytest.raises(ValueError, match="sse9"), use_cpu_path("sse9"):
            pass
        assert backend.cpu_path() == "scalar"
    assert backend.cpu_path() == USABLE[-1]
    assert _C.forced_path() == ""


# ---- explain --------------------------------------------------------------------------------------------------------


def test_explain_lists_every_candidate(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    explanation = explain(ops.int8_linear, X, WEIGHT, SCALE)
    assert (explanation.op, explanation.backend, explanation.path) == ("int8_linear", "cpu", USABLE[-1])
    assert [c.name for c in explanation.candidates if "/" not in c.name] == list(backend.BACKENDS)
    assert {c.name for c in explanation.candidates if "/" in c.name} == {f"cpu/{path}" for path in _C.all_paths()}
    assert [c.name for c in explanation.candidates if c.chosen] == ["cpu", f"cpu/{USABLE[-1]}"]
    reasons = {c.name: c.reason for c in explanation.candidates}
    assert reasons["cpu"] == "chosen"
    assert reasons["cuda"] == "the input is on cpu"
    assert reasons["triton"] == "the input is on cpu"
    assert reasons["reference"] == "passed over: a kernel is faster"
    assert reasons[f"cpu/{USABLE[-1]}"] == "chosen: the highest usable path"
    for path in USABLE[:-1]:
        assert reasons[f"cpu/{path}"] == f"usable; {USABLE[-1]} is higher"
    for path in UNUSABLE:
        assert reasons[f"cpu/{path}"] == _C.why_not_usable(path)


def test_explain_reads_as_a_table():
    lines = str(explain(ops.int8_linear, X, WEIGHT, SCALE)).splitlines()
    assert lines[0] == f"int8_linear: cpu ({USABLE[-1]})"
    assert [line.split()[:2] for line in lines if line.startswith("  *")] == [["*", "cpu"], ["*", f"cpu/{USABLE[-1]}"]]
    assert "    reference       passed over: a kernel is faster" in lines


def test_explain_names_what_is_forced():
    with use_cpu_path("scalar"):
        reasons = {c.name: c.reason for c in explain("int8_linear", X, WEIGHT, SCALE).candidates}
        assert reasons["cpu/scalar"] == "chosen: forced"
        for path in USABLE[1:]:
            assert reasons[f"cpu/{path}"] == "usable; scalar is forced"
    with use_backend("reference"):
        explanation = explain("int8_linear", X, WEIGHT, SCALE)
    assert (explanation.backend, explanation.path) == ("reference", None)
    reasons = {c.name: c.reason for c in explanation.candidates}
    assert reasons == {
        "cuda": "passed over: reference is forced",
        "triton": "passed over: reference is forced",
        "cpu": "passed over: reference is forced",
        "reference": "chosen: forced",
    }


def test_explain_gives_the_kernel_s_own_reason():
    explanation = explain("quantize_per_token", X.to("meta"))
    assert (explanation.backend, explanation.path) == ("reference", None)
    assert {c.name: c.reason for c in explanation.candidates}["cpu"] == "the input is on meta"


def test_explain_unknown_op():
    with pytest.raises(ValueError, match="explain: op: got 'int9_linear', expected one of"):
        explain("int9_linear", X)


# ---- environment, and a package without its extension: in processes of their own ------------------------------------

ONE_CALL = """
import torch
from tcompress import backend, ops
y = ops.int8_linear(torch.ones(1, 4), torch.ones(2, 4, dtype=torch.int8), torch.ones(2), out_dtype=torch.int32)
assert y.tolist() == [[508, 508]]
"""


def run(code, **environment):
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TCOMPRESS_") and k != "PYTHONWARNINGS"}
    return subprocess.run(
        [sys.executable, "-c", code], env={**inherited, **environment}, capture_output=True, text=True, check=False
    )


def last_line(process):
    return process.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("name", "path"), [("reference", "scalar"), ("cpu", USABLE[-1]), ("", "")])
def test_environment_forces(name, path):
    """An empty variable forces nothing."""
    process = run(
        ONE_CALL + "from tcompress import _C\n"
        "print(backend._forced, backend.select('int8_linear', torch.ones(1)), backend.cpu_path(), _C.forced_path())",
        TCOMPRESS_BACKEND=name,
        TCOMPRESS_CPU_PATH=path,
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.split() == f"{name or None} {name or 'cpu'} {path or USABLE[-1]} {path}".split()


def test_environment_names_an_unknown_backend():
    process = run(ONE_CALL, TCOMPRESS_BACKEND="gpu")
    assert process.returncode == 1
    assert last_line(process).startswith("ValueError: TCOMPRESS_BACKEND: name: got 'gpu', expected one of ")


def test_environment_forces_a_backend_that_cannot_run():
    process = run(ONE_CALL, TCOMPRESS_BACKEND="cuda")
    assert process.returncode == 1
    assert last_line(process).startswith("RuntimeError: int8_linear: backend: got 'cuda' (forced), expected ")


def test_environment_names_an_unknown_path():
    """At every call, not only the first; a path that exists and cannot run here is in tests/csrc/test_path.py."""
    process = run(
        "import torch\nfrom tcompress import ops\n"
        "for _ in range(2):\n"
        "    try: ops.quantize_per_token(torch.ones(2))\n"
        "    except Exception as error: print(type(error).__name__, error)\n",
        TCOMPRESS_CPU_PATH="sse9",
    )
    assert process.returncode == 0, process.stderr
    expected = "ValueError cpu path: name: got 'sse9', expected one of scalar, "
    assert [line.startswith(expected) for line in process.stdout.splitlines() if "sse9" in line] == [True, True]


CALLS_WITHOUT_EXTENSION = """
import torch, warnings
from tcompress import backend, explain, ops, use_backend, use_cpu_path
x, weight = torch.ones(1, 4), torch.ones(2, 4, dtype=torch.int8)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(3):
        q, scale, zero_point = ops.quantize_per_token(x)
        packed = ops.int8_prepack(weight)
        y = ops.int8_linear(x, weight, torch.ones(2), None, packed, out_dtype=torch.int32)
assert y.tolist() == [[508, 508]] and q.tolist() == [[127] * 4] and packed.numel() == 16 * (4 + 4) + 4
y = torch.ops.tcompress.int8_linear(x, weight, torch.ones(2), None, None, 8, True, "none", None)
assert torch.allclose(y, 4 * torch.ones(1, 2))
print("warnings:", [w.category.__name__ for w in caught], caught[0].message)
print("path:", backend.cpu_path())
for attempt in (use_cpu_path("scalar"), use_backend("cpu")):
    try:
        with attempt:
            ops.quantize_per_token(x)
    except RuntimeError as error:
        print("forced:", error)
print(explain("int8_linear", x, weight, torch.ones(2)))
"""


@pytest.mark.parametrize(
    ("block", "reason"),
    [
        ("import sys; sys.modules['tcompress._C'] = None", "the C++ extension is not built"),
        (
            """
import sys, importlib.abc
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tcompress._C":
            raise ImportError("undefined symbol: aoti_torch_zero")
sys.meta_path.insert(0, Broken())
""",
            "the C++ extension does not load: undefined symbol: aoti_torch_zero",
        ),
    ],
    ids=["not-built", "does-not-load"],
)
def test_without_extension_the_reference_runs_and_says_so_once(block, reason):
    process = run(block + "\n" + CALLS_WITHOUT_EXTENSION)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert lines[0].startswith(
        "warnings: ['ReferencePathWarning'] quantize_per_token: runs on the slow torch reference"
    )
    assert reason in lines[0]
    assert lines[1] == "path: None"
    assert len([line for line in lines if line.startswith("forced: ") and reason in line]) == 2
    table = lines[lines.index("int8_linear: reference") :]
    assert any(line.split()[:1] == ["cpu"] and reason in line for line in table)
    assert any(line.split() == ["*", "reference", "chosen"] for line in table)


def test_a_missing_dependency_of_the_extension_is_not_taken_for_a_missing_extension():
    process = run(
        """
import sys, importlib.abc
class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "tcompress._C":
            raise ModuleNotFoundError("No module named 'numpy'", name="numpy")
sys.meta_path.insert(0, Broken())
import tcompress
"""
    )
    assert process.returncode == 1
    assert last_line(process) == "ModuleNotFoundError: No module named 'numpy'"
