"""Builds the C++ extensions `tcompress._C` and `tcompress._C_cuda`; the rest is in pyproject.toml.

Environment:
    TCOMPRESS_NO_EXT=1       do not build the extension (the package then runs on its plain torch reference path)
    TCOMPRESS_REQUIRE_EXT=1  fail the installation when an extension cannot be built, instead of warning
    TCOMPRESS_CUDA           build the CUDA kernels? 0, 1, auto: where nvcc is, and torch has CUDA or a GPU is there
    TCOMPRESS_CUDA_ARCH_LIST compute capabilities they are compiled for, "80;90" by default
    MAX_JOBS                 compiler processes (ninja's default otherwise)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import setup

sys.path.insert(0, str(Path(__file__).parent))  # an isolated build does not look here
import setup_cuda

ROOT = Path(__file__).parent
# The extension uses torch's stable ABI of this release, and loads in it and in later ones.
TORCH_TARGET_VERSION = "0x020a000000000000"  # 2.10
COMPILE_FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-maybe-uninitialized",  # GCC 12 reports its own AVX-512 header
    "-Wno-uninitialized",
    # a*b+c rounds twice, as in the reference; where one rounding is meant, the code says fma
    "-ffp-contract=off",
    "-fno-math-errno",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
]


def flag(name: str) -> bool:
    return os.environ.get(name, "0").lower() not in ("", "0", "false", "no")


def extension() -> dict[str, object]:
    """Keyword arguments of `setup` that build `tcompress._C`, or none where it is not wanted."""
    if flag("TCOMPRESS_NO_EXT"):
        return {}
    try:
        import pybind11
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        return without_extension(error)

    nvcc = setup_cuda.wanted()

    class OptionalBuildExtension(BuildExtension):
        """Carries on without the extension when it cannot be built, and says so."""

        def build_extensions(self) -> None:
            try:
                if nvcc:
                    setup_cuda.add_kernels(nvcc, self.extensions, Path(self.build_temp) / "cuda", bool(self.force))
                super().build_extensions()
            except Exception as error:
                without_extension(error)
                self.extensions = []

    sources = [*sorted((ROOT / "csrc").glob("*.cpp")), *sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))]
    module = CppExtension(
        "tcompress._C",
        [str(path.relative_to(ROOT) if path.is_absolute() else path) for path in sources],
        include_dirs=[pybind11.get_include()],
        extra_compile_args={"cxx": COMPILE_FLAGS},
        extra_link_args=["-fopenmp"],
    )
    modules = [module, setup_cuda.extension(nvcc, COMPILE_FLAGS)] if nvcc else [module]
    return {"ext_modules": modules, "cmdclass": {"build_ext": OptionalBuildExtension}}


def without_extension(error: Exception) -> dict[str, object]:
    if flag("TCOMPRESS_REQUIRE_EXT"):
        raise error
    print(
        f"\ntcompress: the C++ extension was NOT built: {error}\n"
        "tcompress: the package will work, much slower, on its plain torch reference path;\n"
        "tcompress: set TCOMPRESS_REQUIRE_EXT=1 to make this an error.\n",
        file=sys.stderr,
    )
    return {}


setup(**extension())
