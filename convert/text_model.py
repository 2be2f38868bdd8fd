"""The text model inside of a multimodal checkpoint: its config, and the places of its tensors in the whole model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from ..errors import UserError, reason

# Text models without a causal class of their own: the type that computes the same of text alone, where rotary sections
# turn by one position, and fields that it needs for that.
STANDS_FOR: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl_text": ("qwen2", {}),
    "qwen2_5_vl_text": ("qwen2", {}),
    "qwen2_5_omni_text": ("qwen2", {}),
    "qwen3_vl_text": ("qwen3", {}),
    "qwen3_vl_moe_text": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_omni_moe_text": ("qwen3_moe", {}),
}
OWN = ("model_type", "transformers_version", "architectures", "auto_map", "torch_dtype")


@dataclass
class Whole:
    """A multimodal model on the meta device.

    names: its own name of a tensor -> the text model's name.   roots: how names of its text decoder and head begin.
    """

    model: PreTrainedModel
    names: dict[str, str]
    roots: tuple[str, ...]

    def is_text(self, name: str) -> bool:
        """True for the `name` of a tensor of the text model, in files that may leave out the model's own prefix."""
        return name.startswith(self.roots) or f"{self.model.base_model_prefix}.{name}".startswith(self.roots)

    def note(self, text_model: PreTrainedModel) -> str:
        """A line on the parts that are left out."""
        around = {"model", *self.roots[0].split(".")}
        others = [name.split(".") for name in self.model.state_dict() if name not in self.names]
        parts = sorted({next(part for part in name if part not in around) for name in others})
        return (
            f"the text model ({text_model.config.model_type}) of a multimodal one ({self.model.config.model_type}) is "
            f"converted; left out: {', '.join(parts) or 'nothing'}"
        )


def is_multimodal(config: PreTrainedConfig) -> bool:
    """True where `config` is that of a model around a text model."""
    text = config.get_text_config(decoder=True)
    return text is not config and text.model_type != config.model_type


def text_config(whole: PreTrainedModel) -> PreTrainedConfig:
    """The config of the text model inside of the multimodal `whole`; a causal model computes the same from it."""
    text: Any = whole.config.get_text_config(decoder=True)
    if text.model_type in STANDS_FOR:
        fields = {name: value for name, value in text.to_dict().items() if name not in OWN}
        fields["rope_parameters"] = {
            name: value for name, value in (text.rope_parameters or {}).items() if not name.startswith("mrope")
        }
        kind, more = STANDS_FOR[text.model_type]
        text = CONFIG_MAPPING[kind](**{**fields, **more})
    text.tie_word_embeddings = bool(whole.all_tied_weights_keys)
    return text


def find_text_model(whole: PreTrainedModel, text_model: PreTrainedModel) -> Whole:
    """The multimodal model `whole`, with the places of the tensors of `text_model` in it, both on the meta device.

    Raises UserError where its text decoder is another model.
    """
    inner_roots = text_model.get_decoder(), text_model
    holders = (module for module in whole.modules() if isinstance(module, PreTrainedModel))
    places = ((holder, root) for holder in holders for root in inner_roots if _same_tensors(root, holder.get_decoder()))
    holder, root = next(places, (None, None))  # Qwen-Omni's whole model has its text model two models down
    if holder is None or root is None:
        raise UserError(
            f"{whole.config.model_type}: its text decoder {type(whole.get_decoder()).__name__} has other tensors than "
            f"{type(text_model).__name__}, so it cannot be taken out"
        )
    decoder = holder.get_decoder()
    inner, outer = _name(text_model, root), _name(whole, decoder)
    names, roots = {f"{outer}{name}": f"{inner}{name}" for name in decoder.state_dict()}, [outer]
    heads = holder.get_output_embeddings(), text_model.get_output_embeddings()
    if heads[0] is not None and heads[1] is not None:
        outer, inner = _name(whole, heads[0]), _name(text_model, heads[1])
        names |= {f"{outer}{name}": f"{inner}{name}" for name in heads[0].state_dict()}
        roots.append(outer)
    return Whole(whole, names, tuple(roots))


def whole_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The multimodal model of `config` on the meta device. Raises UserError where none can be built."""
    mappings: Any = (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
        MODEL_FOR_MULTIMODAL_LM_MAPPING,
        MODEL_FOR_CAUSAL_LM_MAPPING,
    )
    kinds = [mapping[type(config)] for mapping in mappings if type(config) in mapping]
    if not kinds:
        raise UserError(f"{config.model_type} has no text decoder that makes text token by token")
    try:
        with torch.device("meta"):
            return kinds[0](config)
    except Exception as error:  # transformers and torch share no base class for errors in a config
        raise UserError(f"no {config.model_type} model can be built from its config ({reason(error)})") from None


def _same_tensors(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    shapes = [{name: tensor.shape for name, tensor in module.state_dict().items()} for module in (a, b)]
    return shapes[0] == shapes[1]


def _name(model: torch.nn.Module, part: torch.nn.Module) -> str:
    """The path of the module `part` inside of `model`, with a dot at its end; "" for `model` itself."""
    path = next(name for name, module in model.named_modules() if module is part)
    return f"{path}." if path else ""
