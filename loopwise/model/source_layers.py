"""Taps in place of the source model's layers, and one view of the cache per depth.

The source model's own forward embeds the tokens, makes the masks and rotary tables, and applies the final norm and the
head. Its layer list is replaced by taps: each stores the arguments of that layer, and the last runs the recurrence with
the real layers. So no architecture's embedding, masking or head code is written a second time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    LinearAttentionCacheLayerMixin,
    StaticLayer,
    get_layer_types_and_kwargs,
)

from .configuration_recurrent_depth import RecurrentDepthConfig
from .configuration_source import keeps_state

FINAL_NORM = "model.norm"  # of the source; recurrence norms `between` and `last`, and exit gates, use it


def layer_list_name(model: nn.Module, num_layers: int) -> str:
    """Dotted name of the list of decoder layers inside a transformers causal language model, e.g. `model.layers`.

    Raises ValueError unless there is exactly one list of `num_layers` modules with parameters. (Granite's sliding
    variants have one of rotary tables, too.)
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers}
    lists = [n for n, m in found.items() if next(m.parameters(), None) is not None]
    names = [name for name in lists if not any(name.startswith(outer + ".") for outer in lists)]
    if len(names) != 1:
        raise ValueError(f"{type(model).__name__} has {len(names)} lists of {num_layers} layers; exactly one is needed")
    return names[0]


# Architectures whose decoder layers return a tuple; all others return the hidden state alone. (transformers' return
# annotations do not help: some promise a tuple, and the layer returns a tensor.)
TUPLE_LAYERS = {
    "bamba", "bloom", "codegen", "cpmant", "falcon", "falcon_h1", "gpt_neo", "gpt_neox_japanese", "gptj", "mpt",
}  # fmt: skip

# Architectures whose layers, or masks, count the keys that they get: a cache of fixed size gives them empty ones.
GROWING = {"bloom", "gpt_neo", "inkling_text"}

Visit = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]


class Tap(nn.Module):
    """Entry `index` of the source's layer list. Its output is that of `visit(index, hidden_states, args, kwargs)`.

    layer: the layer of the source that stands there, whose names for itself (`block_type`, ...) the tap has too.
    """

    def __init__(self, index: int, visit: Visit, returns_tuple: bool, layer: nn.Module):
        super().__init__()
        self.index, self.visit, self.returns_tuple = index, visit, returns_tuple
        for name, value in vars(layer).items():
            if isinstance(value, str):
                setattr(self, name, value)

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, None]:
        """hidden_states [B, T, D] -> [B, T, D], first of a tuple where the architecture's layers return one."""
        hidden_states = self.visit(self.index, hidden_states, args, kwargs)
        return (hidden_states, None) if self.returns_tuple else hidden_states


def init_layer_buffers(module: nn.Module, config: Any) -> None:
    """Compute the buffers of a layer's `module` that the source's model makes for its layers, which are taps here."""
    if "mup_vector" in dict(module.named_buffers(recurse=False)):  # Falcon-H1
        init.copy_(cast(Any, module).mup_vector, sys.modules[type(module).__module__].compute_mup_vector(config))


class OneSlot:
    """The list of a cache's layers as one layer of the model sees it: its own slot, whatever the index."""

    def __init__(self, layer: Any):
        self._layer = layer

    def __getitem__(self, index: int) -> Any:
        return self._layer


class DepthCache:
    """A view of a cache for one layer: every access goes to one slot, whatever the index of the layer."""

    def __init__(self, cache: Cache, slot: int):
        self._cache, self._slot = cache, slot

    @property
    def layers(self) -> OneSlot:
        """The slot, at every index."""
        return OneSlot(self._cache.layers[self._slot])

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values [B, H, T, D] to the slot; all of it."""
        return self._cache.update(key_states, value_states, self._slot, *args, **kwargs)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of positions in the slot."""
        return self._cache.get_seq_length(self._slot)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The number of keys for `query_length` more tokens, and the position of the first."""
        return self._cache.get_mask_sizes(query_length, self._slot)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """The position of the first token of this call."""
        return self._cache.get_query_offset(self._slot)

    def update_conv_state(self, conv_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Append inputs [B, C, T] of a convolution to the slot's last ones; all of them."""
        return self._cache.update_conv_state(conv_states, self._slot, *args, **kwargs)

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Replace the slot's state of a linear attention or a state space model; the new state."""
        return self._cache.update_recurrent_state(recurrent_states, self._slot, *args, **kwargs)

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Append keys [B, T, D] of a sparse attention's indexer to the slot; all of them."""
        return self._cache.update_indexer(indexer_key_states, self._slot)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """True where the slot has a state of earlier tokens."""
        return self._cache.has_previous_state(self._slot, state_idx)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class Overwriting(DepthCache):
    """A view of a slot into which this call has written before: the new keys and values replace those."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Replace the last T keys and values of the slot by [B, H, T, D]; all of it. Raises ValueError for a cache of
        fixed size."""
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

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """The sizes of slot 0, as those of this slot count the positions that will be replaced."""
        return self._cache.get_mask_sizes(query_length, 0)


def with_slot(arguments: Iterable[Any], cache: Cache | None, view: DepthCache | None) -> list[Any]:
    """`arguments` of a layer with `view` in place of the cache."""
    return [view if cache is not None and a is cache else a for a in arguments]


def prepare_cache(cache: Cache, config: RecurrentDepthConfig, num_recurrences: int) -> None:
    """Make `cache` ready for a call at `num_recurrences`, growing it where it has too few slots.

    Raises ValueError for a cache of fixed size that would have to grow, or whose empty slots the source's layers would
    count, and for layers of other attention types than the slots. So it does for deep slots that hold fewer positions
    than the first, which attention would skip. (In a compiled call on a written static cache, a RuntimeError, from the
    graph.)
    """
    kind = config.source_config.model_type
    if kind in GROWING and any(isinstance(layer, StaticLayer) for layer in cache.layers):
        raise ValueError(
            f"{kind} counts the keys of a cache, and this {type(cache).__name__} has a fixed number of them: use a "
            "DynamicCache (cache_implementation='dynamic'), or use_cache=False"
        )
    slots = config.slots(num_recurrences)
    types, given = get_layer_types_and_kwargs(config.source_config)
    options: Any = given  # one for each layer
    if isinstance(options, dict):  # transformers < 5.19: one for all
        options = [options] * len(types)
    wanted = [(types[layer], options[layer]) for layer in slots]
    if config.has_choice_slot:  # it comes after the slots of all depths, those beyond this call's included
        wanted = [(types[layer], options[layer]) for layer in config.slots(config.max_recurrences)]
        wanted.append(("full_attention", {}))
    if isinstance(cache, DynamicCache):
        layers: list[Any] = cache.layers
        while len(layers) > len(wanted) and not _is_written(layers[-1]):
            layers.pop()  # `crop`, which assisted decoding calls, fails on slots that were never written
    if cache.layer_class_to_replicate is None and len(cache.layers) < len(wanted):
        if not isinstance(cache, DynamicCache):
            raise ValueError(
                f"num_recurrences={num_recurrences}: this {type(cache).__name__} has slots for "
                f"max_recurrences={config.max_recurrences}; raise that before the cache is made, or use a DynamicCache"
            )
        recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
        for kind, arguments in wanted[len(cache.layers) :]:
            layer: Any = DYNAMIC_LAYER_TYPE_MAPPING[kind](**arguments)
            if recording and hasattr(layer, "activate_past_recording"):  # assisted decoding takes proposed tokens back
                layer.activate_past_recording()
            cache.layers.append(layer)
    sliding, kinds = cache.is_sliding[: len(slots)], [types[layer] for layer in slots]
    stateful = [isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers[: len(slots)]]
    windowed = [getattr(DYNAMIC_LAYER_TYPE_MAPPING[kind], "is_sliding", False) for kind in kinds]
    with_state = [keeps_state(kind) for kind in kinds]
    if (any(sliding) and sliding != windowed) or (any(with_state) and stateful != with_state):
        raise ValueError(
            f"the attention types of this {type(cache).__name__}'s layers are not those of the model's key-value "
            "slots; make it with config=model.config"
        )
    _check_filled(cache, config, num_recurrences, len(slots))


def _is_written(layer: Any) -> bool:
    """True where a cache's layer holds keys and values, or a state."""
    states = isinstance(layer, LinearAttentionCacheLayerMixin) and any(layer.has_previous_state.values())
    return states or getattr(layer, "is_initialized", False)


def _check_filled(cache: Cache, config: RecurrentDepthConfig, num_recurrences: int, slots: int) -> None:
    """Raise ValueError unless the last of the first `slots` slots holds as many positions as the first.

    A slot that is a state has no length: the cache remembers the least depth of its calls in its place.
    """
    counting = [n for n, layer in enumerate(cache.layers[:slots]) if isinstance(layer, CacheLayerMixin)]
    counting = counting or [0, slots - 1]  # a cache that makes its layers when they are written
    ends: list[Any] = [cache.get_seq_length(slot) for slot in (counting[0], counting[-1])]
    if torch.compiler.is_compiling() and any(isinstance(length, torch.Tensor) for length in ends):
        # A static cache counts in tensors, which a graph can compare only where it runs.
        torch._assert_async(  # pyright: ignore[reportPrivateUsage]
            ends[0] == ends[1], "the cache was prefilled at a smaller depth than is read now"
        )
        return
    length, filled = int(ends[0]), num_recurrences
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers[:slots]):
        filled = getattr(cache, "least_recurrences", num_recurrences) if length else num_recurrences
        cast(Any, cache).least_recurrences = min(filled, num_recurrences)
    if config.depends_on_recurrences:
        made = getattr(cache, "filled_at", num_recurrences) if length else num_recurrences
        if made != num_recurrences:
            raise ValueError(
                f"num_recurrences={num_recurrences}, but the cache was filled at {made}, and this model's states "
                "depend on R (recurrence_damping='1/R', time_conditioning): use one R for a text"
            )
        cast(Any, cache).filled_at = num_recurrences
    if length != int(ends[1]):
        first = len(config.prelude) + len(config.coda)
        core = [int(cache.get_seq_length(slot)) == length for slot in counting if slot >= first]
        filled = sum(core) * config.kv_slots(num_recurrences) // len(core)
    if filled < num_recurrences:
        raise ValueError(
            f"num_recurrences={num_recurrences}, but the cache holds all {length} positions only up to depth "
            f"{filled}; prefill it at the greatest depth that will be read"
        )
