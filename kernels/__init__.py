"""GPU kernels in Triton, installed as `tcompress.kernels`. None yet: on a GPU the ops run their torch reference."""
