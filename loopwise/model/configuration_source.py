"""The source's config inside ours: its construction, and its fields that describe the source's files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .configuration_sandwich import SandwichConfig

# Switches under which a source's forward collects the outputs of its layers. Its layer list holds taps: the forward
# would collect nothing of the layers, and some architectures then fail.
COLLECTING = ("output_attentions", "output_hidden_states", "output_router_logits")
# Fields for the loading of a checkpoint's files. They describe the source's files, not ours.
LOADING = (
    "auto_map", "tokenizer_class", "processor_class", "model_name", "transformers_weights", "quantization_config",
    "_name_or_path",
)  # fmt: skip


def source_config_of(given: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of class `model_type` with the other fields of `given`. Raises ValueError for an unknown class."""
    rest = dict(given)
    kind = rest.pop("model_type", None)
    if kind == SandwichConfig.model_type:  # transformers lacks it, and another class of that name may be registered
        return SandwichConfig(**rest)
    return AutoConfig.for_model(kind, **rest)  # pyright: ignore[reportUnknownMemberType]


def clear_source_settings(source: PreTrainedConfig, collecting: tuple[str, ...] = COLLECTING) -> None:
    """Change `source`, a source's config or that of a plain model that is written anew.

    Fields that load the source's own files are removed; switches that collect the outputs of layers are turned off.
    """
    for name in LOADING:
        source.__dict__.pop(name, None)
    for name in collecting:
        if getattr(source, name, None):
            setattr(source, name, False)
    source.return_dict = True  # without it a forward returns bare tuples


def declares(kind: type[PreTrainedConfig], name: str) -> bool:
    """True where the class `kind` of a source's config declares the attribute `name`. Extra fields do not count."""
    if name == "head_dim":  # modules ask every config for it, declared or not
        return True
    return name in kind.attribute_map or hasattr(kind, name) or any(name == field.name for field in fields(kind))
