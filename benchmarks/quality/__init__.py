"""Pretrained models out of registry packages, each with labelled data, for `model_quality.py`; a model a file."""
