"""The model class of a source's config."""

from __future__ import annotations

from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .configuration_sandwich import SandwichConfig
from .configuration_ungated import UngatedConfig
from .modeling_sandwich import SandwichForCausalLM
from .modeling_ungated import UngatedForCausalLM

OWN: dict[str, type[PreTrainedModel]] = {
    SandwichConfig.model_type: SandwichForCausalLM,
    UngatedConfig.model_type: UngatedForCausalLM,
}


def causal_lm_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """transformers' class, or ours for architectures that it lacks.

    Ours are found by `model_type`: in remote code, the config and the model come from two copies of these files.
    """
    return OWN.get(config.model_type) or cast(Any, MODEL_FOR_CAUSAL_LM_MAPPING)[type(config)]
