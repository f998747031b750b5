"""Builds a Hugging Face model from the configuration that a checkpoint holds."""

from __future__ import annotations

from typing import Any

from torch import nn

from tcompress.errors import message


def hugging_face_info(model: nn.Module) -> dict[str, Any] | None:
    """Class and configuration of a `transformers` model, or None for any other module."""
    config: Any = getattr(model, "config", None)
    if not type(model).__module__.startswith("transformers.") or not hasattr(config, "to_dict"):
        return None
    info: dict[str, Any] = {"class": type(model).__name__, "config": config.to_dict()}
    generation: Any = getattr(model, "generation_config", None)
    if generation is not None:
        info["generation_config"] = generation.to_dict()
    return info


def new_model(info: dict[str, Any]) -> nn.Module:
    """A model with untrained weights of the class and configuration in `info`.

    Raises:
        ImportError: transformers is not installed. ValueError: it has no such class.
    """
    try:
        import transformers
    except ImportError as error:
        hint = "pip install tcompress[demo], or pass model="
        raise ImportError(message("load", "transformers", str(error), "it installed", hint)) from error
    name = str(info.get("class"))
    model_class: Any = getattr(transformers, name, None)
    if not isinstance(model_class, type) or not issubclass(model_class, transformers.PreTrainedModel):
        hint = "install the release of transformers that the model was saved with, or pass model="
        raise ValueError(message("load", "class", repr(name), "a model class of transformers", hint))
    if not isinstance(info.get("config"), dict):
        raise ValueError(message("load", "config", type(info.get("config")).__name__, "a mapping"))
    config_class: Any = model_class.config_class
    model: Any = model_class(config_class.from_dict(info["config"]))
    if "generation_config" in info:
        model.generation_config = transformers.GenerationConfig.from_dict(info["generation_config"])
    return model
