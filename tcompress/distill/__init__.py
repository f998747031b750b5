"""Distillation and training while compressing: one loss, and one algorithm, a file.

`tcompress.distill`, the function, is in `tcompress.distill_step`; what a recipe says of all this, in
`tcompress.recipe`.
"""
