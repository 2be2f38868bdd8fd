"""prelude -> s_0 -> R x (inject, core) -> coda over vLLM's own decoder layers.

vLLM's source model keeps its list of layers, one for each set of weights, and runs it as ever; but each listed layer
hands its input on, and the last one runs the whole recurrence. The recurrence runs *views* of the layers: the same
weights, and for every depth an `Attention`, so a KV cache, of its own. Shapes: N tokens of the step, D width.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

from ...model.initial_state import initial_state
from ...model.injection import Injection


class Recurrence(nn.Module):
    """Runs in place of the last of `layers`: the unique layers in the order prelude, core, coda.

    `forward` takes what vLLM's source model passes to a layer, and returns what such a layer returns.
    """

    def __init__(
        self,
        config,
        num_recurrences: int,
        layers: list[nn.Module],
        injection: Injection,
        norm: Callable[[torch.Tensor], torch.Tensor] | None,
        context: dict,
    ):
        """`norm`: what `config.recurrence_norm` names."""
        super().__init__()
        self.config = config
        self.injection = injection
        self.norm = (norm,)  # a tuple: it is another module's child
        self.convention = convention(layers[0])
        first, last = len(config.prelude), len(config.prelude) + len(config.core)

        def views(start: int, stop: int, shift: int = 0) -> nn.ModuleList:
            return nn.ModuleList(view(layers[i], i, i + shift, context) for i in range(start, stop))

        # Depth 0 has the attention of the listed layers; the others are numbered on from the last layer of the list.
        shifts = [0] + [len(layers) - first + depth * len(config.core) for depth in range(num_recurrences - 1)]
        self.prelude = views(0, first)
        self.core = nn.ModuleList(views(first, last, shift) for shift in shifts)
        self.coda = views(last, len(layers))

    def forward(self, *args, **kwargs):
        return self.convention(self, *args, **kwargs)

    def run(self, x: torch.Tensor, positions: torch.Tensor, call: Callable[..., tuple[torch.Tensor, Any]]):
        """x [N, D] or [1, N, D], the embedded tokens -> (x, residual) after the coda.

        `call(layer, x, residual) -> (x, residual)`: many of vLLM's layers leave it to the next norm to add the residual
        stream. Where the state itself is needed, the pair is folded. Those norms also write into the residual that
        they get; that never spoils e, as every injection that reads e again returns a new tensor.
        """
        residual = None
        for layer in self.prelude:
            x, residual = call(layer, x, residual)
        e = fold(x, residual)
        x, residual = self._initial_state(e, positions), None
        core: Any = self.core
        if self.config.sharing == "sequence":
            for n in range(len(self.config.core)):
                for layers in core:
                    x, residual = call(layers[n], x, residual)
        else:
            for depth, layers in enumerate(core):
                x, residual = self._recurrence(depth, fold(x, residual), e), None
                for layer in layers:
                    x, residual = call(layer, x, residual)
            x, residual = self._end(x, residual)
        for layer in self.coda:
            x, residual = call(layer, x, residual)
        return x, residual

    def _recurrence(self, depth: int, s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        """What the core's first layer gets."""
        kind, norm = self.config.recurrence_norm, self.norm[0]
        if norm is not None and (kind == "each" or kind == "between") and depth:
            s = norm(s)
        return self.injection(s, e)

    def _end(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What the coda gets, as (x, residual)."""
        norm = self.norm[0]
        if norm is None or self.config.recurrence_norm == "between":
            return x, residual
        return norm(fold(x, residual)), None

    def _initial_state(self, e: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        # One sequence id for all requests, as transformers has by default: noise then depends on the position alone.
        return initial_state(self.config, e.view(1, -1, e.shape[-1]), positions.view(1, -1), None).view(e.shape)


def fold(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    return x if residual is None else x + residual


def _fused(self: Recurrence, positions, hidden_states, residual=None, **kwargs):
    """vLLM's layers that take and return (hidden_states, residual). Its models' final norms want both."""
    x, residual = self.run(hidden_states, positions, lambda layer, x, residual: layer(positions, x, residual, **kwargs))
    return x, torch.zeros_like(x) if residual is None else residual


def _plain(self: Recurrence, positions, hidden_states, **kwargs):
    """vLLM's layers that take and return hidden_states."""
    return self.run(hidden_states, positions, lambda layer, x, _: (layer(positions, x, **kwargs), None))[0]


def _transformers(self: Recurrence, hidden_states, *args, **kwargs):
    """transformers' layers inside vLLM's Transformers backend."""
    positions = kwargs["position_ids"]
    return self.run(hidden_states, positions, lambda layer, x, _: (layer(x, *args, **kwargs), None))[0]


def convention(layer: nn.Module) -> Callable:
    """Which of the three ways of calling a layer is this one's."""
    names = list(inspect.signature(type(layer).forward).parameters)[1:]
    if names[0] == "hidden_states":
        return _transformers
    return _fused if "residual" in names else _plain


def hand_on(layer: nn.Module) -> Callable:
    """The forward of a listed layer that the recurrence runs for: it returns its input."""
    return {
        _fused: lambda positions, hidden_states, residual=None, **kwargs: (hidden_states, residual),
        _plain: lambda positions, hidden_states, **kwargs: hidden_states,
        _transformers: lambda hidden_states, *args, **kwargs: hidden_states,
    }[convention(layer)]


def view(module: nn.Module, index: int, new_index: int, context: dict[str, Any], top: bool = True) -> nn.Module:
    """Layer `index` once more: shares every weight, and has Attention objects named for layer `new_index`.

    Only modules on the way down to an Attention are copied, shallowly. For `new_index` == `index` the Attention is
    shared too. New ones enter `context`, vLLM's static forward context, from which it allocates a KV cache for each.
    Raises ValueError where a layer keeps another kind of state.
    """
    if isinstance(module, Attention):
        return module if new_index == index else attention_named(module, index, new_index, context)
    if isinstance(module, AttentionLayerBase):
        raise ValueError(f"{type(module).__name__} keeps a state that cannot be had once per recurrence")
    children = {
        name: child and view(child, index, new_index, context, top=False) for name, child in module._modules.items()
    }
    if not top and all(child is module._modules[name] for name, child in children.items()):
        return module
    return shallow_copy(module, children)


def attention_named(attention: Attention, index: int, new_index: int, context: dict[str, Any]) -> Any:
    """The `attention` of layer `index` once more, with a cache of its own, named for layer `new_index`."""
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
    """`module` once more, with the same parameters and other children."""
    new = copy.copy(module)
    new._modules = dict(children)
    for name, value in vars(module).items():
        if isinstance(value, MethodType) and value.__self__ is module:  # vLLM binds rewritten forwards to instances
            setattr(new, name, MethodType(value.__func__, new))
    return new
