"""The source's config inside ours: how it is built, and what of it is about the source's files alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_sandwich import SandwichConfig

# Switches under which a source's forward collects what its layers return. Its layer list holds taps: it would collect
# nothing of the layers, and some architectures then fail.
COLLECTING = ("output_attentions", "output_hidden_states", "output_router_logits")
# Fields that say which classes load a checkpoint's files. They are about the source's files, not about ours.
LOADING = ("auto_map", "tokenizer_class", "processor_class", "model_name", "transformers_weights")


def source_config_of(given: dict[str, Any]) -> Any:
    """The config of class `model_type` with the other fields of `given`. Raises ValueError for an unknown one."""
    rest = dict(given)
    kind = rest.pop("model_type", None)
    if kind == SandwichConfig.model_type:  # transformers lacks it, whatever this process has registered
        return SandwichConfig(**rest)
    return AutoConfig.for_model(kind, **rest)


def ours_alone(source: Any, collecting: tuple[str, ...] = COLLECTING) -> None:
    """Take from a source's config, or a plain model's that is written anew, what would load its own files, and what
    would collect the outputs of its layers."""
    for name in LOADING:
        source.__dict__.pop(name, None)
    for name in collecting:
        if getattr(source, name, None):
            setattr(source, name, False)
    source.return_dict = True  # without, a forward gives bare tuples


def declares(kind: type[PreTrainedConfig], name: str) -> bool:
    """True where class `kind` of a source's config has the attribute `name`, and not one config.json alone."""
    if name == "head_dim":  # modules ask every config for it, declared or not
        return True
    return name in kind.attribute_map or hasattr(kind, name) or any(name == field.name for field in fields(kind))
