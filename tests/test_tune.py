"""Which layout is chosen, and what of a measurement is kept."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from tcompress import _C, Scheme, tune, use_backend, use_cpu_path
from tcompress.sparse_kernel import DENSE, SparseKernel, kernels_for

W8A8 = Scheme.named("W8A8")
FLOATS, INTEGERS = ("dense", "unstructured", "8x4"), ("dense", "1x4", "8x4")


def weight(n=64, k=96, kept=0.2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, k, generator=generator) * (torch.rand(n, k, generator=generator) < kept)


def integers(n=64, k=96, kept=0.2):
    return (weight(n, k, kept) * 40).round().clamp(-127, 127).to(torch.int8)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """The cache's file, which does not exist yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "tcompress" / "tune.json"


@pytest.fixture
def measured(monkeypatch):
    """Takes the place of the measurement: what it gives, and how often it was asked."""

    class Measured:
        def __init__(self):
            self.seconds = {"dense": 4e-3, "unstructured": 3e-3, "8x4": 2e-3, "1x4": 3e-3}
            self.busy, self.calls = False, 0

        def __call__(self, weight, kernels, tokens, dtype):
            self.calls += 1
            return {kernel.layout: self.seconds[kernel.layout] for kernel in kernels}, self.busy

    instead = Measured()
    monkeypatch.setattr(tune, "measure", instead)
    return instead


def choose(w=None, tokens=128, scheme=None):
    w = weight() if w is None else w
    return tune.choose(w, kernels_for(w, scheme), tokens)


def test_candidates():
    assert tuple(kernel.layout for kernel in kernels_for(weight(), None)) == FLOATS
    assert tuple(kernel.layout for kernel in kernels_for(integers(), W8A8)) == INTEGERS
    assert [kernel.layout for kernel in kernels_for(weight().to("meta"), None)] == ["dense"]


@pytest.mark.parametrize(("make", "scheme"), [(weight, None), (integers, W8A8)])
def test_a_real_measurement(cache, make, scheme):
    choice = choose(make(), 4, scheme)
    assert set(choice.seconds) == set(FLOATS if scheme is None else INTEGERS)
    assert all(0 < seconds < 1 for seconds in choice.seconds.values())
    assert choice.source in ("measured", "measured on a busy machine")
    assert choice.speedup >= 1
    assert choice.kernel.layout in choice.seconds


def test_the_fastest_is_taken_and_kept(cache, measured):
    first = choose()
    assert (first.kernel.layout, first.source, first.tokens) == ("8x4", "measured", 128)
    assert first.speedup == pytest.approx(2)
    again = choose()
    assert (again.kernel, again.source, again.seconds) == (first.kernel, "cached", first.seconds)
    assert measured.calls == 1
    assert list(json.loads(cache.read_text()).values()) == [first.seconds]


@pytest.mark.parametrize(
    ("dense", "layout"), [(1.9e-3, "dense"), (2e-3, "dense"), (2.05e-3, "dense"), (2.07e-3, "8x4"), (9e-3, "8x4")]
)
def test_a_sparse_layout_must_be_faster_by_more_than_noise(cache, measured, dense, layout):
    measured.seconds = measured.seconds | {"dense": dense}
    choice = choose()
    assert choice.kernel.layout == layout
    assert choice.speedup == pytest.approx(1 if layout == DENSE else dense / 2e-3)


def test_what_a_busy_machine_gave_is_not_kept(cache, measured):
    measured.busy = True
    measured.seconds = {k.layout: 2 * tune.model_seconds(weight(), k, 128) for k in kernels_for(weight(), None)}
    assert choose().source == "measured on a busy machine"
    assert not cache.exists()
    measured.busy = False
    assert choose().source == "measured"
    assert measured.calls == 2


def test_times_of_a_scheduler_are_not_believed(cache, measured):
    """Each call waited for a processor: all layouts take as long, and the choice would be the dense one."""
    measured.busy, measured.seconds = True, dict.fromkeys(FLOATS, 8.0)
    choice = choose(weight(512, 512, kept=0.01))
    assert choice.source == "model: the machine is too busy to measure"
    assert choice.kernel.layout != DENSE
    assert not cache.exists()


def test_other_processes_are_noticed(cache, monkeypatch):
    readings = iter([(100.0, 10.0, 5.0), (102.0, 12.0, 6.0)])
    monkeypatch.setattr(tune, "_processor_seconds", lambda: next(readings))
    _, busy = tune.measure(weight(8, 8), kernels_for(weight(8, 8), None), 1)
    assert busy  # two seconds passed on all processors, one of them another's


def test_a_busy_machine_is_noticed(cache, monkeypatch):
    """One call in a few is fast: another process has the processor in the others."""
    clock = {"now": 0.0, "call": 0}

    def now():
        clock["call"] += 1
        if clock["call"] % 2 == 0:  # the end of a call
            clock["now"] += 1e-3 if clock["call"] % 10 == 0 else 9e-3
        return clock["now"]

    monkeypatch.setattr(tune.time, "perf_counter", now)
    monkeypatch.setattr(tune, "ROUND_SECONDS", 0.05)
    seconds, busy = tune.measure(weight(8, 8), kernels_for(weight(8, 8), None), 1)
    assert busy
    assert all(value == pytest.approx(1e-3) for value in seconds.values())


@pytest.mark.parametrize(
    "other",
    [
        lambda: choose(tokens=64),
        lambda: choose(weight(63)),
        lambda: choose(weight(k=92)),
        lambda: choose(weight(kept=0.4)),
        lambda: choose(integers(), scheme=W8A8),
    ],
    ids=["tokens", "outputs", "inputs", "density", "type"],
)
def test_another_layer_is_measured_anew(cache, measured, other):
    choose()
    assert other().source == "measured"
    assert measured.calls == 2


def test_a_layer_alike_is_not(cache, measured):
    choose(weight())
    assert choose(-2 * weight().flip(1)).source == "cached"


def test_schemes_are_measured_apart(cache, measured):
    choose(integers(), scheme=W8A8)
    assert choose(integers(), scheme=Scheme.named("W7A7")).source == "measured"


def test_threads_are_measured_apart(cache, measured):
    choose()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        assert choose().source == "measured"
    finally:
        torch.set_num_threads(before)
    assert choose().source == "cached"


def test_paths_are_measured_apart(cache, measured):
    usable = [path for path in _C.all_paths() if not _C.why_not_usable(path)]
    for path in usable:
        with use_cpu_path(path):
            assert choose().source == "measured"
    assert measured.calls == len(usable)
    assert choose().source == "cached"


def test_a_version_is_measured_apart(cache, measured, monkeypatch):
    choose()
    monkeypatch.setattr(tune, "_machine", lambda: "another processor, another release")
    assert choose().source == "measured"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[1, 2]", b"3", b"null", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": {"b": 1}, "c": "d", "e": true}'],
)
def test_a_damaged_or_foreign_file_holds_nothing(cache, measured, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    assert choose().source == "measured"
    assert choose().source == "cached"
    assert len(json.loads(cache.read_text())) == 1


@pytest.mark.parametrize(
    "value", ["true", "null", '"fast"', "-1.0", "0.0", "NaN", "Infinity", "1" + "0" * 400, "[2.0]"]
)
def test_values_that_are_no_seconds_are_measured(cache, measured, value):
    choose()
    keys = json.loads(cache.read_text())
    for inner in (value, "{" + ", ".join(f'"{layout}": {value}' for layout in FLOATS) + "}"):
        cache.write_text("{" + ", ".join(f"{json.dumps(key)}: {inner}" for key in keys) + "}")
        assert tune._read() == {}
    assert choose().source == "measured"
    assert choose().source == "cached"


def test_what_others_measured_stays_in_the_file(cache, measured):
    cache.parent.mkdir(parents=True)
    cache.write_text('{"another layer": {"dense": 0.5}}')
    choose()
    assert json.loads(cache.read_text())["another layer"] == {"dense": 0.5}


def test_the_file_is_replaced_whole(cache, measured, monkeypatch):
    """Who reads meanwhile sees the old file or the new one; what fails leaves the old one and nothing beside it."""
    choose()
    old = cache.read_text()
    seen = []

    def replace(source, target):
        seen.append((Path(source).parent, json.loads(Path(source).read_text()), cache.read_text() == old))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", replace)
    assert choose(tokens=7).source == "measured"
    ((folder, content, untouched),) = seen
    assert (folder, len(content), untouched) == (cache.parent, 2, True)
    assert cache.read_text() == old
    assert list(cache.parent.iterdir()) == [cache]


def test_a_folder_that_cannot_be_made(tmp_path, measured, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert choose().source == "measured"
    assert choose().source == "measured"
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_folder_in_the_file_s_place(cache, measured):
    cache.mkdir(parents=True)
    assert choose().kernel.layout == "8x4"
    assert list(cache.parent.iterdir()) == [cache]


def test_without_a_home_folder(measured, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    assert choose().source == "measured"


def test_where_the_file_lies(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tune.cache_file() == tmp_path / ".cache" / "tcompress" / "tune.json"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert tune.cache_file() == tmp_path / ".cache" / "tcompress" / "tune.json"


@pytest.mark.parametrize(("make", "scheme"), [(weight, None), (integers, W8A8)])
def test_the_model_of_costs_reads_and_writes_nothing(cache, measured, monkeypatch, make, scheme):
    choose(make(), scheme=scheme)
    text = cache.read_text()
    monkeypatch.setenv("TCOMPRESS_TUNE", "0")
    choice = choose(make(), scheme=scheme)
    assert (choice.source, measured.calls) == ("model", 1)
    assert choose(make(k=200), scheme=scheme).source == "model"
    assert cache.read_text() == text


@pytest.mark.parametrize("path", [None, "scalar"])
@pytest.mark.parametrize(("make", "scheme"), [(weight, None), (integers, W8A8)])
def test_the_model_s_order(make, scheme, path):
    """Full float weights run dense, almost empty ones do not, and less of a weight costs less."""
    with use_cpu_path(path):
        sizes = {kept: make(512, 512, kept) for kept in (0.01, 0.3, 1.0)}
        costs = [
            {kernel.layout: tune.model_seconds(w, kernel, 128) for kernel in kernels_for(w, scheme)}
            for w in sizes.values()
        ]
    if scheme is None:
        assert min(costs[0], key=costs[0].get) != DENSE
        assert min(costs[2], key=costs[2].get) == DENSE
    for layout in set(costs[2]) - {DENSE}:  # the almost empty weight is 2:4 as well
        assert costs[0][layout] < costs[1][layout] <= costs[2][layout]
    assert costs[0][DENSE] == costs[2][DENSE] > 0


def test_the_only_one_is_not_measured(cache, measured):
    with use_backend("reference"):
        choice = choose()
    assert (choice.kernel, choice.source, choice.speedup) == (SparseKernel(DENSE, None), "the only one", 1.0)
    assert measured.calls == 0
    assert not cache.exists()


@pytest.mark.parametrize("tokens", [0, -1])
def test_tokens(tokens):
    with pytest.raises(ValueError, match=f"tune: tokens: got {tokens}, expected at least 1"):
        choose(tokens=tokens)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 0), (0, 4)])
def test_small_weights(cache, shape):
    assert choose(torch.zeros(shape), 2).kernel.layout in FLOATS
    assert choose(torch.zeros(shape, dtype=torch.int8), 2, W8A8).kernel.layout in (*INTEGERS, "2:4")


def test_the_cache_is_not_the_user_s():
    assert Path.home() / ".cache" not in tune.cache_file().parents


@pytest.mark.parametrize(
    ("scheme", "tokens", "faster"), [("W7A7", 128, True), ("W7A7", 1, False), ("W8A8", 128, False), ("W8A8", 1, False)]
)
def test_the_model_of_two_four(scheme, tokens, faster):
    """Only unsigned activations of many tokens meet these weights as they lie."""
    w = integers(64, 128)
    w.view(64, 32, 4)[..., 2:] = 0
    with use_cpu_path("avx2" if not _C.why_not_usable("avx2") else None):
        costs = {k.layout: tune.model_seconds(w, k, tokens) for k in kernels_for(w, Scheme.named(scheme))}
        assert (costs["2:4"] < costs[DENSE]) == (faster and not _C.why_not_usable("avx2"))
