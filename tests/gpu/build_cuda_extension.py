"""`python build_cuda_extension.py FOLDER`: builds tcompress._C_cuda alone into FOLDER, as setup.py builds it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

from setuptools import setup  # noqa: E402
from torch.utils.cpp_extension import BuildExtension  # noqa: E402

import setup_cuda  # noqa: E402


class Build(BuildExtension):
    def build_extensions(self) -> None:
        setup_cuda.add_kernels(nvcc, self.extensions, Path(self.build_temp) / "cuda", False)
        super().build_extensions()


folder = sys.argv[1]
nvcc = setup_cuda.wanted()
assert nvcc, "TCOMPRESS_CUDA=1 is not set"
flags = ["-std=c++17", "-O1", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
sys.argv = ["setup.py", "-q", "build_ext", f"--build-lib={folder}", f"--build-temp={folder}/temp"]
setup(
    name="cuda_extension", ext_modules=[setup_cuda.extension(nvcc, flags)], cmdclass={"build_ext": Build}, packages=[]
)
