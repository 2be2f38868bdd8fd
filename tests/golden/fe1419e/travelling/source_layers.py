"""What stands in for the source model's layer list, and one view of the cache per depth.

The source model's own forward embeds the tokens, makes the masks and rotary tables, and applies the final norm and the
head. Its layer list is replaced by taps: each notes what the source passes to that layer, the last runs the recurrence
with the real layers. So no architecture's embedding, masking or head code is written a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    DynamicCache,
    DynamicLayer,
    get_layer_types_and_kwargs,
)


def layer_list_name(model: nn.Module, num_layers: int) -> str:
    """Dotted name of the list of decoder layers inside a transformers causal language model, e.g. `model.layers`.

    Raises ValueError where there is not exactly one list of `num_layers` modules.
    """
    lists = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers}
    names = [name for name in lists if not any(name.startswith(outer + ".") for outer in lists)]
    if len(names) != 1:
        raise ValueError(f"{type(model).__name__} has {len(names)} lists of {num_layers} layers; exactly one is needed")
    return names[0]


# Architectures whose decoder layers still return a tuple; all others return the hidden state alone. (The return
# annotations in transformers do not tell: some promise a tuple and return a tensor.)
TUPLE_LAYERS = {"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt"}

WINDOWED = ("sliding_attention", "chunked_attention")  # attention types whose key-value cache keeps a window only


class Tap(nn.Module):
    """Stands at place `index` of the source's layer list."""

    def __init__(self, index: int, visit: Callable, returns_tuple: bool):
        super().__init__()
        self.index, self.visit, self.returns_tuple = index, visit, returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs):
        hidden_states = self.visit(self.index, hidden_states, args, kwargs)
        return (hidden_states,) if self.returns_tuple else hidden_states


class DepthCache:
    """A view of a cache that sends every access of one layer to one slot, whatever index the layer was built with."""

    def __init__(self, cache: Cache, slot: int):
        self._cache, self._slot = cache, slot

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        return self._cache.update(key_states, value_states, self._slot, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0):
        return self._cache.get_seq_length(self._slot)

    def get_mask_sizes(self, query_length, layer_idx: int = 0):
        return self._cache.get_mask_sizes(query_length, self._slot)

    def __getattr__(self, name):
        return getattr(self._cache, name)


class Overwriting(DepthCache):
    """The view of a slot into which this call has written before: what it wrote gives way to the new."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        kind = type(self._cache.layers[self._slot])
        if kind is not DynamicLayer:
            raise ValueError(
                f"this kv_policy overwrites keys and values, which a {kind.__name__} of a cache cannot: "
                "use_cache=False, or serve the model"
            )
        layer: Any = self._cache.layers[self._slot]
        kept = layer.keys.shape[-2] - key_states.shape[-2]
        layer.keys, layer.values = layer.keys[..., :kept, :], layer.values[..., :kept, :]
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def get_mask_sizes(self, query_length, layer_idx: int = 0):
        return self._cache.get_mask_sizes(query_length, 0)


def with_slot(arguments: Iterable, cache: Cache | None, view: DepthCache | None) -> list:
    """`arguments` with the cache, wherever it stands among them, replaced by `view`."""
    return [view if cache is not None and a is cache else a for a in arguments]


def prepare_cache(cache: Cache, config, num_recurrences: int) -> None:
    """Make `cache` ready for a call at `num_recurrences`, growing it where it has too few slots.

    Raises ValueError where a fixed-size cache cannot grow, where its layers are of other attention types than the
    slots, or where the deepest slots hold fewer positions than the first: reading them would silently skip what those
    positions said. (In a compiled call on a written static cache, a RuntimeError, from the graph.)
    """
    slots = config.slots(num_recurrences)
    types, given = get_layer_types_and_kwargs(config.source_config)
    options: list[Any] = given if isinstance(given, list) else [given] * len(types)  # transformers < 5.19: one for all
    wanted = [(types[layer], options[layer]) for layer in slots]
    if config.has_choice_slot:  # it stands after all depths, however many this call has
        wanted = [(types[layer], options[layer]) for layer in config.slots(config.max_recurrences)]
        wanted.append(("full_attention", {}))
    if isinstance(cache, DynamicCache):
        layers: list[Any] = cache.layers
        while len(layers) > len(wanted) and not layers[-1].is_initialized:
            layers.pop()  # `crop`, which assisted decoding calls, fails on slots that were never written
    if cache.layer_class_to_replicate is None and len(cache.layers) < len(wanted):
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"num_recurrences={num_recurrences}: this {type(cache).__name__} has slots for "
                f"max_recurrences={config.max_recurrences}; raise that before the cache is made, or use a DynamicCache"
            )
        for kind, arguments in wanted[len(cache.layers) :]:
            cache.layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments))
    sliding = cache.is_sliding[: len(slots)]
    if any(sliding) and sliding != [types[layer] in WINDOWED for layer in slots]:
        raise ValueError(
            f"the attention types of this {type(cache).__name__}'s layers are not those of the model's key-value "
            "slots; make it with config=model.config"
        )
    ends: list[Any] = [cache.get_seq_length(slot) for slot in (0, len(slots) - 1)]
    if torch.compiler.is_compiling() and any(isinstance(length, torch.Tensor) for length in ends):
        # a static cache counts in tensors, which a graph can compare where it runs and nowhere else
        torch._assert_async(ends[0] == ends[1], "the cache was prefilled at a smaller depth than is read now")
        return
    if int(ends[0]) != int(ends[1]):
        lengths = [int(cache.get_seq_length(slot)) for slot in range(len(slots))]
        filled = sum(length == lengths[0] for length in lengths) - len(config.prelude) - len(config.coda)
        raise ValueError(
            f"num_recurrences={num_recurrences}, but the cache holds all {lengths[0]} positions only up to depth "
            f"{filled // len(config.core)}; prefill it at the greatest depth that will be read"
        )
