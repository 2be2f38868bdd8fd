"""The source's config inside ours: its construction, and its fields that describe the source's files alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from transformers import AutoConfig, PreTrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
)

from .configuration_sandwich import SandwichConfig
from .configuration_ungated import UngatedConfig

OWN = {kind.model_type: kind for kind in (SandwichConfig, UngatedConfig)}  # sources that transformers lacks

# Switches under which a source's forward collects the outputs of its layers. Its layer list holds taps: the forward
# would collect nothing of the layers, and some architectures then fail.
COLLECTING = ("output_attentions", "output_hidden_states", "output_router_logits")
# Fields for the loading of a checkpoint's files. They describe the source's files, not ours.
LOADING = (
    "auto_map", "tokenizer_class", "processor_class", "model_name", "transformers_weights", "quantization_config",
    "_name_or_path",
)  # fmt: skip
# Attention types whose cache holds keys and values, and nothing else.
KEYS_ALONE = ("full_attention", "sliding_attention", "chunked_attention")
# Attributes that a class computes without declaring them, and that caches are made by.
COMPUTED = {"inkling_text": ("number_of_conv_states",), "modernbert-decoder": ("sliding_window",)}


def source_config_of(given: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of class `model_type` with the other fields of `given`. Raises ValueError for an unknown class."""
    rest = dict(given)
    kind = rest.pop("model_type", None)
    if kind in OWN:  # another class of that name may be registered
        return OWN[kind](**rest)
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
    if name == "head_dim" or name in COMPUTED.get(kind.model_type, ()):  # modules ask every config for the head size
        return True
    return name in kind.attribute_map or hasattr(kind, name) or any(name == field.name for field in fields(kind))


def keeps_state(kind: str) -> bool:
    """True for an attention type of transformers whose layers keep a state: linear attention, a convolution, a state
    space model, alone or beside keys and values."""
    return issubclass(DYNAMIC_LAYER_TYPE_MAPPING.get(kind, DynamicLayer), LinearAttentionCacheLayerMixin)


def keeps_keys(kind: str) -> bool:
    """True for an attention type of transformers whose layers keep keys and values, which count positions."""
    return issubclass(DYNAMIC_LAYER_TYPE_MAPPING.get(kind, DynamicLayer), CacheLayerMixin)
