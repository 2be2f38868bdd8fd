"""Taps in place of the source model's layers, and one view of the cache per depth.

The source model's own forward embeds the tokens, makes the masks and rotary tables, and applies the final norm and the
head. Its layer list is replaced by taps: each stores the arguments of that layer, and the last runs the recurrence with
the real layers. So no architecture's embedding, masking or head code is written a second time.
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

from .configuration_recurrent_depth import RecurrentDepthConfig

FINAL_NORM = "model.norm"  # of the source; recurrence norms `between` and `last`, and exit gates, use it


def layer_list_name(model: nn.Module, num_layers: int) -> str:
    """Dotted name of the list of decoder layers inside a transformers causal language model, e.g. `model.layers`.

    Raises ValueError unless there is exactly one list of `num_layers` modules.
    """
    lists = {n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == num_layers}
    names = [name for name in lists if not any(name.startswith(outer + ".") for outer in lists)]
    if len(names) != 1:
        raise ValueError(f"{type(model).__name__} has {len(names)} lists of {num_layers} layers; exactly one is needed")
    return names[0]


# Architectures whose decoder layers return a tuple; all others return the hidden state alone. (transformers' return
# annotations do not help: some promise a tuple, and the layer returns a tensor.)
TUPLE_LAYERS = {"bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt"}

Visit = Callable[[int, torch.Tensor, tuple[Any, ...], dict[str, Any]], torch.Tensor]
WINDOWED = ("sliding_attention", "chunked_attention")  # attention types whose key-value cache keeps a window only


class Tap(nn.Module):
    """Entry `index` of the source's layer list. Its output is that of `visit(index, hidden_states, args, kwargs)`."""

    def __init__(self, index: int, visit: Visit, returns_tuple: bool):
        super().__init__()
        self.index, self.visit, self.returns_tuple = index, visit, returns_tuple

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor | tuple[torch.Tensor]:
        """hidden_states [B, T, D] -> [B, T, D], in a tuple where the architecture's layers return one."""
        hidden_states = self.visit(self.index, hidden_states, args, kwargs)
        return (hidden_states,) if self.returns_tuple else hidden_states


class DepthCache:
    """A view of a cache for one layer: every access goes to one slot, whatever the index of the layer."""

    def __init__(self, cache: Cache, slot: int):
        self._cache, self._slot = cache, slot

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

    Raises ValueError for a cache of fixed size that would have to grow, and for layers of other attention types than
    the slots. So it does for deep slots that hold fewer positions than the first, which attention would skip. (In a
    compiled call on a written static cache, a RuntimeError, from the graph.)
    """
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
    _check_filled(cache, config, num_recurrences, len(slots))


def _check_filled(cache: Cache, config: RecurrentDepthConfig, num_recurrences: int, slots: int) -> None:
    """Raise ValueError unless the last of the first `slots` slots holds as many positions as the first."""
    ends: list[Any] = [cache.get_seq_length(slot) for slot in (0, slots - 1)]
    if torch.compiler.is_compiling() and any(isinstance(length, torch.Tensor) for length in ends):
        # A static cache counts in tensors, which a graph can compare only where it runs.
        torch._assert_async(  # pyright: ignore[reportPrivateUsage]
            ends[0] == ends[1], "the cache was prefilled at a smaller depth than is read now"
        )
        return
    if int(ends[0]) != int(ends[1]):
        lengths = [int(cache.get_seq_length(slot)) for slot in range(slots)]
        filled = sum(length == lengths[0] for length in lengths) - len(config.prelude) - len(config.coda)
        raise ValueError(
            f"num_recurrences={num_recurrences}, but the cache holds all {lengths[0]} positions only up to depth "
            f"{filled // len(config.core)}; prefill it at the greatest depth that will be read"
        )
