"""GPU kernels in Triton, the package `tcompress.kernels`. No op calls them yet: the ops run their reference on a GPU."""
