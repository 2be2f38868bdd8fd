"""Settings of the computation in training: gradient checkpointing and torch.compile."""

from __future__ import annotations

from typing import Any

from loopwise.model.source_layers import layer_list_name

from .pretrained import is_recurrent


def configure(model: Any, checkpointing: str, compiled: str) -> None:
    """Apply the recipe keys `gradient_checkpointing` and `compile` to `model`, in place."""
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if checkpointing == "recurrence" and is_recurrent(model.config):
        for layer in model.core:
            layer.gradient_checkpointing = False
        model.checkpoint_recurrences = True
    if compiled == "layer":
        if is_recurrent(model.config):
            layers = [*model.prelude, *model.core, *model.coda]
        else:
            layers = model.get_submodule(layer_list_name(model, model.config.num_hidden_layers))
        for layer in layers:
            layer.compile(dynamic=False)
