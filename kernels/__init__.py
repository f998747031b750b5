"""GPU kernels in Triton, the package `tcompress.kernels`; `tcompress.ops` runs them on CUDA tensors."""
