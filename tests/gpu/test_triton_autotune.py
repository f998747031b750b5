"""The choice of tiles and its file, with a measurement of its own instead of a GPU's."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
import triton_cases

triton_cases.require()

from tcompress.kernels.triton import autotune  # noqa: E402
from tcompress.kernels.triton.tiles import TileConfig  # noqa: E402
from triton.runtime.errors import OutOfResources, PTXASError  # noqa: E402

STORED = TileConfig(16, 32, 64, kernel="k", architecture="sm_90")
FAST, SLOW, HARDLY = (replace(STORED, block_n=n) for n in (64, 16, 128))
SECONDS = {STORED: 1.0, FAST: 0.5, SLOW: 2.0, HARDLY: 0.99}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TCOMPRESS_TUNE", raising=False)
    monkeypatch.setattr(autotune, "_known", {})
    return autotune.cache_file("cpu")


class Measured:
    """Counts what is measured."""

    def __init__(self):
        self.runs = []

    def __call__(self, call):
        return SECONDS[call()]

    def choose(self, stored=STORED, candidates=(FAST, SLOW), kernel="k", sizes="16x16"):
        def run(tile):
            self.runs.append(tile)
            return tile

        return autotune.choose(kernel, sizes, stored, lambda: candidates, run, torch.zeros(1), self)


def forget():
    autotune._known.clear()


def test_the_fastest_is_measured_once_and_kept(cache):
    measured = Measured()
    assert measured.choose() == FAST
    assert measured.runs == [STORED, FAST, SLOW]
    assert measured.choose() == FAST
    forget()
    assert measured.choose() == FAST
    assert len(measured.runs) == 3
    measured.choose(sizes="32x16")
    assert len(measured.runs) == 6
    content = json.loads(cache.read_text())
    assert len(content) == 2
    assert content["k 16x16"]["name"] == FAST.name == "k/sm_90/16x64x64-4w2s"
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


def test_a_hair_faster_is_noise():
    assert Measured().choose(candidates=(HARDLY,)) == STORED


def test_turned_off_or_off_cuda(cache, monkeypatch):
    measured = Measured()
    assert autotune.choose("k", "1", STORED, lambda: [FAST], lambda tile: 1 / 0, torch.zeros(1)) == STORED
    measured.choose()
    monkeypatch.setenv("TCOMPRESS_TUNE", "0")
    assert measured.choose() == STORED
    assert len(measured.runs) == 3


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"k 16x16": 3}', '{"k 16x16": {"block_m": "x"}}', '{"a": {"block_m": -1}}', "\xff"]
)
def test_a_damaged_file_is_told_and_measured_again(cache, content):
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content.encode("latin-1"))
    measured = Measured()
    with pytest.warns(RuntimeWarning, match="measured again"):
        assert measured.choose() == FAST
    forget()
    assert measured.choose() == FAST
    assert len(measured.runs) == 3


def test_a_tile_of_another_kind_is_measured_again(cache):
    cache.parent.mkdir(parents=True)
    cache.write_text(json.dumps({"k 16x16": {"block_m": 16}}))
    assert Measured().choose() == FAST


def test_a_folder_that_cannot_be_written_is_told(cache):
    cache.parent.parent.mkdir(exist_ok=True)
    cache.parent.write_text("a file")
    measured = Measured()
    with pytest.warns(RuntimeWarning, match="not kept"):
        assert measured.choose() == FAST
    assert measured.choose() == FAST
    assert len(measured.runs) == 3


def test_what_does_not_fit_is_passed_over_and_other_errors_are_not():
    def run(tile):
        if tile is FAST:
            raise OutOfResources(300_000, 100_000, "shared memory")
        if tile is SLOW:
            raise PTXASError("too many registers")
        return tile

    def choose(run):
        return autotune.fastest(STORED, [FAST, SLOW], run, lambda call: SECONDS[call()])

    assert choose(run) == STORED
    with pytest.raises(ZeroDivisionError):
        choose(lambda tile: tile if tile is STORED else 1 / 0)


def _write_many(path, number):
    for i in range(20):
        autotune._write(path, {f"{number} {i}": {"block_m": 16}})


def test_writers_at_once_leave_a_whole_file(cache):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: _write_many(cache, i), range(4)))
    content = json.loads(cache.read_text())
    assert any(key.endswith(" 19") for key in content)
    assert [p.name for p in cache.parent.iterdir()] == [cache.name]


def test_files_are_by_gpu_and_version(cache):
    name = autotune.cache_file("NVIDIA H100 80GB HBM3").name
    assert name.startswith("triton-NVIDIA-H100-80GB-HBM3-")
    assert name != cache.name


def test_a_tile_of_another_table_is_measured_again(cache):
    """Whose names say other things: the file of an earlier release, or of another GPU."""
    measured = Measured()
    measured.choose()
    content = json.loads(cache.read_text())
    content["k 16x16"]["name"] = "k/sm_80/16x64x64-4w2s"
    cache.write_text(json.dumps(content))
    forget()
    assert measured.choose() == FAST
    assert len(measured.runs) == 6


def test_neighbours_and_tokens():
    assert [t.warps for t in autotune.neighbours(STORED, warps=(4, 8))] == [8]
    assert autotune.neighbours(STORED, split=(2,))[0].name == "k/sm_90/16x32x64-4w2s-k2"
    assert autotune.tokens(0) == 1
    assert autotune.tokens(33) == 64
