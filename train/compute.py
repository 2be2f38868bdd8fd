"""Settings of the computation in training: gradient checkpointing and torch.compile."""

from __future__ import annotations

from typing import Any

from loopwise.errors import UserError
from loopwise.model.source_layers import layer_list_name

from .pretrained import is_recurrent


def configure(model: Any, checkpointing: str, compiled: str) -> None:
    """Apply the recipe keys `gradient_checkpointing` and `compile` to `model`, in place.

    Raises UserError where the layers of `model` cannot be checkpointed.
    """
    recurrent = is_recurrent(model.config)
    can = any(hasattr(module, "gradient_checkpointing") for module in model.modules())  # CTRL's layers cannot
    if checkpointing == "layer" and not can:
        kind = model.config.source_config.model_type if recurrent else model.config.model_type
        others = "recurrence or none" if recurrent else "none"
        raise UserError(f"gradient_checkpointing=layer: transformers cannot checkpoint {kind} layers; use {others}")
    if checkpointing != "none" and can:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if checkpointing == "recurrence" and recurrent:
        for layer in model.core:
            layer.gradient_checkpointing = False
        model.checkpoint_recurrences = True
    if compiled == "layer":
        if recurrent:
            layers = [*model.prelude, *model.core, *model.coda]
        else:
            layers = model.get_submodule(layer_list_name(model, model.config.num_hidden_layers))
        for layer in layers:
            layer.compile(dynamic=False)
