"""GPU kernels in Triton, the package `tcompress.kernels`. No op calls them yet: on a GPU the references run."""
