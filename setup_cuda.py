"""Builds the CUDA extension `tcompress._C_cuda` with nvcc, for setup.py.

torch's own CUDAExtension wants a torch built for CUDA. This one uses torch's stable ABI and a static CUDA runtime, so
it can be built with, and loads in, a torch for the CPU alone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from setuptools import Extension

ROOT = Path(__file__).parent
CUDA = ROOT / "csrc" / "cuda"
DEFAULT_ARCHITECTURES = "80;90"
GPU = Path("/dev/nvidia0")
#: A constexpr function is one for both sides. The rest as the other sources are compiled.
NVCC_FLAGS = ["-std=c++17", "-O3", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


def find_nvcc() -> str | None:
    """nvcc under CUDA_HOME or in PATH."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home and (Path(home) / "bin" / "nvcc").exists():
        return str(Path(home) / "bin" / "nvcc")
    return shutil.which("nvcc")


def wanted() -> str | None:
    """nvcc where the extension is to be built, else None: TCOMPRESS_CUDA is 0, 1 or auto.

    auto: where nvcc is found and either torch is built for CUDA or a GPU is there; nvcc takes a minute and more.

    Raises:
        RuntimeError: TCOMPRESS_CUDA=1 without nvcc. ValueError: another value.
    """
    choice = os.environ.get("TCOMPRESS_CUDA", "auto").lower()
    if choice not in ("0", "1", "auto"):
        raise ValueError(f"setup: TCOMPRESS_CUDA: got {choice!r}, expected 0, 1 or auto")
    nvcc = find_nvcc()
    if choice == "0" or (choice == "auto" and nvcc is None):
        return None
    if nvcc is None:
        raise RuntimeError("setup: TCOMPRESS_CUDA: got 1 but no nvcc, expected one under CUDA_HOME or in PATH")
    import torch

    if choice == "auto" and torch.version.cuda is None and not GPU.exists():
        return None
    return nvcc


def architecture_flags(text: str) -> list[str]:
    """nvcc's flags for architectures such as "80;90"; the last one as PTX too, for GPUs to come.

    Raises:
        ValueError: not numbers such as 80 or 90a between semicolons.
    """
    names = [name.strip() for name in text.split(";") if name.strip()]
    if not names or not all(name[:2].isdigit() and name.isalnum() for name in names):
        raise ValueError(f"setup: TCOMPRESS_CUDA_ARCH_LIST: got {text!r}, expected such as {DEFAULT_ARCHITECTURES!r}")
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


def cuda_library_folder(nvcc: str) -> Path:
    """Where the static runtime lies; asked of nvcc, which may be a script that calls another."""
    done = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in done.stderr.splitlines():
        name, _, value = line.removeprefix("#$ ").partition("=")
        if name == "TOP":
            home = Path(value.strip())
            for folder in ("lib64", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib", "lib"):
                if (home / folder / "libcudart_static.a").exists():
                    return home / folder
    raise RuntimeError(f"setup: {nvcc}: got no libcudart_static.a beside it, expected the CUDA toolkit's runtime")


def extension(nvcc: str, compile_flags: list[str]) -> Extension:
    """The extension but for the objects that `compile_kernels` adds."""
    from torch.utils.cpp_extension import CppExtension

    made: Extension = CppExtension(
        "tcompress._C_cuda",
        [str(path.relative_to(ROOT)) for path in sorted(CUDA.glob("bindings_*.cpp"))],
        extra_compile_args={"cxx": compile_flags},
        library_dirs=[str(cuda_library_folder(nvcc))],
        libraries=["cudart_static", "rt", "dl", "pthread"],
        # of the static runtime nothing is visible, so that it cannot be taken for torch's
        extra_link_args=["-Wl,--exclude-libs,ALL"],
        depends=[str(path.relative_to(ROOT)) for path in sorted(CUDA.iterdir())],
    )
    return made


def add_kernels(nvcc: str, extensions: list[Any], folder: Path, force: bool) -> None:
    """Compiles the kernels of the last extension; where that fails and nobody insisted, says so and leaves it out."""
    try:
        compile_kernels(nvcc, extensions[-1], folder, force)
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get("TCOMPRESS_CUDA") == "1":
            raise
        print(
            f"\ntcompress: the CUDA kernels were NOT built: {error}\ntcompress: TCOMPRESS_CUDA=1 makes this an error."
        )
        extensions.pop()


def compile_kernels(nvcc: str, made: Any, folder: Path, force: bool) -> None:
    """Compiles csrc/cuda/*.cu that have changed, side by side, and adds the objects to the extension.

    Raises:
        subprocess.CalledProcessError: nvcc failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [*NVCC_FLAGS, *architecture_flags(os.environ.get("TCOMPRESS_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)]
    newest_header = max(path.stat().st_mtime for path in CUDA.iterdir() if path.suffix in (".h", ".cuh"))

    def compile_one(source: Path) -> str:
        target, used = folder / f"{source.stem}.o", folder / f"{source.stem}.flags"
        fresh = target.exists() and used.exists() and used.read_text() == repr([nvcc, *flags])
        if force or not fresh or target.stat().st_mtime < max(newest_header, source.stat().st_mtime):
            used.unlink(missing_ok=True)
            subprocess.run([nvcc, *flags, "-c", str(source), "-o", str(target)], check=True)
            used.write_text(repr([nvcc, *flags]))
        return str(target)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        made.extra_objects = [*made.extra_objects, *pool.map(compile_one, sorted(CUDA.glob("*.cu")))]
