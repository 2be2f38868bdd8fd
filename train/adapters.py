"""PEFT's LoRA adapters inside a model: trained instead of its own weights, and merged into them at the end.

The model keeps its class, so that all else works as without them. A checkpoint holds the base weights under their own
names, so that it loads as a model, and the adapters in a file beside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file

from loopwise.errors import UserError

from .recipe import Adapters

FILE = "adapters.safetensors"


def inject(model: Any, keys: Adapters, checkpoint: Path | None) -> None:
    """Put adapters beside the linear modules that `keys` name; with those of `checkpoint`, else new ones.

    Raises UserError where the names match no module.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(keys.targets or _linear_names(model))
    config = LoraConfig(
        r=keys.rank,
        lora_alpha=cast(Any, keys.rank if keys.alpha is None else keys.alpha),
        lora_dropout=keys.dropout,
        target_modules=targets,
        exclude_modules=r"relaxation\..*|source\..*|router\..*",  # names of which are those of layers
    )
    try:
        inject_adapter_in_model(config, model)
    except ValueError:
        choices = ", ".join(sorted(_linear_names(model)))
        raise UserError(
            f"adapters.targets={','.join(targets)}: no such linear modules; choose from {choices}"
        ) from None
    if checkpoint:
        tensors = load_file(checkpoint / FILE)
        own = {name: p for name, p in model.named_parameters() if ".lora_" in name and name in tensors}
        assert own.keys() == tensors.keys(), "the run is the same, so the adapters are"
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])


def _linear_names(model: Any) -> set[str]:
    """Names, within a layer, of the linear modules of the layers."""
    parts = [getattr(model, name) for name in ("prelude", "core", "coda") if hasattr(model, name)] or [model]
    head = model.get_output_embeddings()
    return {
        name.rpartition(".")[2]
        for part in parts
        for name, module in part.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def split(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(base weights under their own names, adapters) of a model with adapters."""
    adapters = {name: x for name, x in state.items() if ".lora_" in name and not name.startswith("relaxation.")}
    return {name.replace(".base_layer.", "."): x for name, x in state.items() if name not in adapters}, adapters


def save(adapters: dict[str, torch.Tensor], directory: Path) -> None:
    save_file({name: x.contiguous().cpu() for name, x in adapters.items()}, directory / FILE)


def merged(state: dict[str, torch.Tensor], keys: Adapters) -> dict[str, torch.Tensor]:
    """The weights of the model without adapters that computes the same: W + alpha / rank B A."""
    base, adapters = split(state)
    scale = (keys.rank if keys.alpha is None else keys.alpha) / keys.rank
    for name, a in adapters.items():
        if ".lora_A." in name:
            weight = name.replace(".lora_A.default.weight", ".weight")
            change = adapters[name.replace(".lora_A.", ".lora_B.")].float() @ a.float() * scale
            # Conv1D (GPT-2) keeps its weight transposed
            base[weight] = base[weight] + (change if change.shape == base[weight].shape else change.T).to(a.dtype)
    return base
