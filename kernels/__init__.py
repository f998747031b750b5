"""GPU kernels in Triton, installed as `tcompress.kernels`. No op calls them yet: on a GPU the ops run their reference."""
