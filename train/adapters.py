"""PEFT's LoRA adapters: trained instead of the model's own weights, and merged into them at the end.

The model keeps its class. A checkpoint holds the base weights under their own names, so that it loads as a model, and
the adapters in a file beside them.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from loopwise.errors import UserError

from .recipe import Adapters

FILE = "adapters.safetensors"


def inject(model: Any, keys: Adapters, checkpoint: Path | None) -> None:
    """Add adapters to the linear modules that `keys` name, in place: those of `checkpoint`, or new ones.

    Raises UserError for a name that is not a linear module of a layer, and for one that cannot be merged. Embeddings
    and the head may share their weights, and fused experts are not modules.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = _linear(model)
    for target in keys.targets or ():
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            choices = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
            raise UserError(
                f"adapters.targets={target}: no linear module of a layer has this name; choose from {choices}"
            )
    targets = list(keys.targets or {name.rpartition(".")[2] for name in linear})
    if not targets:
        raise UserError("adapters: this model has no linear modules in its layers; train it without")
    _check_mergeable(model, targets)
    config = LoraConfig(
        r=keys.rank,
        lora_alpha=cast(Any, keys.rank if keys.alpha is None else keys.alpha),
        lora_dropout=keys.dropout,
        target_modules=targets,
        exclude_modules=r"relaxation\..*|source\..*|router\..*",  # these contain modules with the names of layers
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Conv1D, which PEFT detects, and about an empty exclusion
        inject_adapter_in_model(config, model)
    if checkpoint:
        tensors = load_file(checkpoint / FILE)
        present = {name: p for name, p in model.named_parameters() if ".lora_" in name and name in tensors}
        assert present.keys() == tensors.keys(), "a resumed run has the same adapters"
        with torch.no_grad():
            for name, parameter in present.items():
                parameter.copy_(tensors[name])


def _check_mergeable(model: Any, targets: list[str]) -> None:
    """Raises UserError for a target whose matrix a relaxation with DoRA norms: the norm of W + B A is another one."""
    relaxation = getattr(model.config, "relaxation", None) or {}
    normed = {path.rpartition(".")[2] for path in relaxation.get("rank", ())} if relaxation.get("dora") else set()
    if wrong := sorted(normed & {target.rpartition(".")[2] for target in targets}):
        raise UserError(
            f"adapters: {', '.join(wrong)} have LoRA with dora for each depth, into which adapters cannot be merged: "
            "name other adapters.targets, or train that LoRA (optimiser.train=lora,norms)"
        )


def _linear(model: Any) -> list[str]:
    """Names of the linear modules of the layers. GPT-2's Conv1D is linear with a transposed weight."""
    parts = [name for name in ("prelude", "core", "coda") if hasattr(model, name)] or [""]
    head = model.get_output_embeddings()
    return [
        f"{part}.{name}".lstrip(".")
        for part in parts
        for name, module in model.get_submodule(part).named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
    ]


def transposed(model: Any) -> set[str]:
    """Names of the adapted weights that are stored transposed."""
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), Conv1D)
    }


def split(state: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(base weights under their own names, adapters) from the state of a model with adapters."""
    adapters = {name: x for name, x in state.items() if ".lora_" in name and not name.startswith("relaxation.")}
    return {name.replace(".base_layer.", "."): x for name, x in state.items() if name not in adapters}, adapters


def save(adapters: dict[str, torch.Tensor], directory: Path) -> None:
    """Write the adapters into `directory`."""
    save_file({name: x.contiguous().cpu() for name, x in adapters.items()}, directory / FILE)


def merged(state: dict[str, torch.Tensor], keys: Adapters, transposed: set[str]) -> dict[str, torch.Tensor]:
    """The base weights with the adapters merged into them: W + alpha / rank B A (LoRA, arXiv 2106.09685).

    transposed: names of the weights that are stored as W^T.
    """
    base, adapters = split(state)
    scale = (keys.rank if keys.alpha is None else keys.alpha) / keys.rank
    for name, a in adapters.items():
        if ".lora_A." in name:
            weight = name.replace(".lora_A.default.weight", ".weight")
            change = adapters[name.replace(".lora_A.", ".lora_B.")].float() @ a.float() * scale
            base[weight] = base[weight] + (change.T if weight in transposed else change).to(a.dtype)
    return base
