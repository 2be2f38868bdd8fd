"""vLLM's decoder layers: how one is called, and copies that share its weights and have a KV cache of their own."""

from __future__ import annotations

import copy
import inspect
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

Convention = Literal["fused", "plain", "transformers"]


def convention_of(layer: nn.Module) -> Convention:
    """The way in which vLLM's model calls its `layer`:

    fused: (positions, x, residual) -> (x, residual). The next norm adds the residual stream.
    plain: (positions, x) -> x.
    transformers: (x [1, N, D], ...) -> x. A layer of transformers inside vLLM's Transformers backend.
    """
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    if names[0] == "hidden_states":
        return "transformers"
    return "fused" if "residual" in names else "plain"


def fold(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """The state behind a fused layer's (x, residual)."""
    return x if residual is None else x + residual


def layer_copy(module: nn.Module, index: int, new_index: int, context: dict[str, Any], top: bool = True) -> nn.Module:
    """A copy of layer `index` that shares every weight, and whose Attention objects are named for layer `new_index`.

    Only modules on the way down to an Attention are copied, shallowly. For `new_index` == `index` the Attention is
    shared too. New ones are registered in `context`, vLLM's static forward context, from which it allocates a KV cache
    for each. Raises ValueError where a layer keeps another kind of state.
    """
    if isinstance(module, Attention):
        return module if new_index == index else attention_copy(module, index, new_index, context)
    if isinstance(module, AttentionLayerBase):
        raise ValueError(f"{type(module).__name__} keeps a state that cannot be had once per recurrence")
    children = {
        name: child and layer_copy(child, index, new_index, context, top=False)
        for name, child in module._modules.items()
    }
    if not top and all(child is module._modules[name] for name, child in children.items()):
        return module
    return shallow_copy(module, children)


def attention_copy(attention: Attention, index: int, new_index: int, context: dict[str, Any]) -> Any:
    """A copy of the `attention` of layer `index`, named for layer `new_index`, with a KV cache of its own.

    It is registered in `context`. Raises ValueError where that has the name already.
    """
    new: Any = shallow_copy(attention, attention._modules)
    parts = attention.layer_name.split(".")
    new.layer_name = ".".join(str(new_index) if part == str(index) else part for part in parts)
    new.impl = copy.copy(attention.impl)  # backends keep views of the layer's own cache there
    new.kv_cache = torch.tensor([])
    if new.layer_name in context:
        raise ValueError(f"two layers are called {new.layer_name}")
    context[new.layer_name] = new
    return new


def shallow_copy(module: nn.Module, children: dict[str, nn.Module | None]) -> nn.Module:
    """A copy of `module` with the same parameters and other children."""
    new = copy.copy(module)
    new._modules = dict(children)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # vLLM binds rewritten forwards to instances
            setattr(new, name, MethodType(value.__func__, new))
    return new
