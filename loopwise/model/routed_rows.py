"""The tokens that a router chooses for a recurrence: their rows, masks, and keys and values.

Shapes: B batch, T tokens of this call, D width, R recurrences, K keys, N chosen tokens (of the fullest sequence).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from .source_layers import DepthCache

# Architectures whose layers count positions, and take none as an argument.
COUNTING = {"bloom", "gpt_neo", "llama4_text", "mpt"}
HIDING = {"mpt"}  # architectures whose masks are True where a token is hidden


class Rows:
    """The tokens `selected` [B, T] of a call, on which a recurrence runs.

    gather: True lets the core run on these tokens alone, [B, N, D]; False on all, where a key-value cache needs a row
        for every one. Architectures whose layers count positions always run on all.
    index: [B, N], with `gather`, the selected positions of each sequence, filled up with T.
    """

    def __init__(self, selected: torch.Tensor, gather: bool, source_config: PreTrainedConfig):
        counting = source_config.model_type in COUNTING or bool(getattr(source_config, "alibi", False))
        self.selected, self.gather = selected, gather and not counting
        self.hides = source_config.model_type in HIDING
        if self.gather:
            length = selected.shape[1]
            places = torch.arange(length, device=selected.device).expand_as(selected)
            counts = selected.sum(1)
            most = max(int(counts.max()), 1)
            self.index = torch.where(selected, places, length).sort(dim=1).values[:, :most]
            self.full = bool((counts == most).all())

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """The rows [B, N, D] of x [B, T, D]; all T where the core runs on all."""
        if not self.gather:
            return x
        return x.gather(1, self.index.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[-1]))

    def put(self, x: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] with the rows replaced by `new` [B, N, D]."""
        if not self.gather:
            return torch.where(self.selected[..., None], new, x)
        index = self.index[..., None].expand(-1, -1, x.shape[-1])
        if self.full:
            return x.scatter(1, index, new)
        return F.pad(x, (0, 0, 0, 1)).scatter(1, index, new)[:, :-1]

    def arguments(self, given: dict[str, Any], keys: torch.Tensor | None, past: int, offset: int) -> dict[str, Any]:
        """The arguments `given` of a layer, for these rows of T tokens after `past` others.

        keys [B, past + T]: True for tokens that have keys and values at this recurrence; None for all. offset: position
        of the first token in the layer's cache.
        """
        mask = given["attention_mask"]
        if not self.gather:
            return given if keys is None else {**given, "attention_mask": self._among(mask, keys, past, offset)}
        batch, changed = len(self.selected), {}
        if keys is None:
            changed["attention_mask"] = self._of_rows(self._spelled_out(mask, past))
        elif mask is not None:  # without a mask, rows are causal among themselves: those that fill up come last
            changed["attention_mask"] = self._of_rows_and_columns(mask)
        if given.get("position_ids") is not None:
            changed["position_ids"] = self.take(given["position_ids"].expand(batch, -1)[..., None]).squeeze(-1)
        if given.get("position_embeddings") is not None:
            tables = given["position_embeddings"]  # sines and cosines, or complex numbers
            rows = [self.take(table.expand(batch, -1, -1)) for table in (tables if type(tables) is tuple else [tables])]
            changed["position_embeddings"] = tuple(rows) if type(tables) is tuple else rows[0]
        return {**given, **changed}

    def _spelled_out(self, mask: torch.Tensor | None, past: int) -> torch.Tensor:
        """The mask [B, 1 or H, T, K]; transformers leaves out one that is causal."""
        batch, length = self.selected.shape
        if mask is None:
            ones = torch.ones(length, past + length, dtype=torch.bool, device=self.selected.device)
            mask = ones.tril(past)[None, None]
        return mask.expand(batch, -1, -1, -1)

    def _among(self, mask: torch.Tensor | None, keys: torch.Tensor, past: int, offset: int) -> torch.Tensor:
        """The mask of all rows and the columns in `keys`; each row attends to itself too, which keeps it finite."""
        mask = self._spelled_out(~mask if self.hides and mask is not None else mask, past)
        seen = F.pad(keys[:, offset:], (0, mask.shape[-1] - keys.shape[1] + offset))
        row = torch.arange(keys.shape[1] - past, device=keys.device)[:, None] + past - offset
        itself = row == torch.arange(mask.shape[-1], device=keys.device)
        among = _allow(_forbid(mask, ~seen[:, None, None]), itself)
        return ~among if self.hides else among

    def _of_rows(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask [.., N, K] of these rows, from that of all, [.., T, K]."""
        index = self.index.clamp(max=mask.shape[2] - 1)[:, None, :, None]
        return mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[-1]))

    def _of_rows_and_columns(self, mask: torch.Tensor) -> torch.Tensor:
        """The mask [.., N, N] of these rows among themselves; those that fill up are seen by themselves alone."""
        filling = (self.index == mask.shape[2])[:, None]
        mask = self._of_rows(self._spelled_out(mask, 0))
        index = self.index.clamp(max=mask.shape[3] - 1)[:, None, None, :]
        mask = mask.gather(3, index.expand(-1, *mask.shape[1:3], -1))
        itself = torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
        return _allow(_forbid(mask, filling[:, :, None]), filling[..., None] & itself)


def _forbid(mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """`mask`, boolean or additive, that hides the places `where` too."""
    return mask & ~where if mask.dtype == torch.bool else mask.masked_fill(where, torch.finfo(mask.dtype).min)


def _allow(mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """`mask`, boolean or additive, that shows the places `where` too."""
    return mask | where if mask.dtype == torch.bool else mask.masked_fill(where, 0)


def by_name(layer: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer, all by name, without the first, the hidden states."""
    names = list(inspect.signature(layer.forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


class ChoiceSlot:
    """The slot of a cache that holds, for every token so far, the recurrences at which it has keys and values.

    It is one more layer of the cache, so that reordering, repeating or cropping a cache changes the choices too.
    """

    def __init__(self, cache: Cache, slot: int, past: int):
        self.cache, self.slot, self.past = cache, slot, past

    def keys(self, r: int, selected: torch.Tensor) -> torch.Tensor:
        """True [B, past + T] for the tokens that recurrence r has run, this call's `selected` [B, T] among them."""
        if not self.past:
            return selected
        layer: Any = self.cache.layers[self.slot]
        return torch.cat([layer.keys[:, 0, : self.past, r] > 0, selected], dim=1)

    def add(self, selected: list[torch.Tensor], depths: int, dtype: torch.dtype) -> None:
        """Store the choices [B, T] of this call's recurrences, once all have run; `depths` is the most there may be."""
        chosen = torch.stack(selected, -1).to(dtype)[:, None]
        chosen = F.pad(chosen, (0, depths - chosen.shape[-1]))
        self.cache.update(chosen, chosen, self.slot)

    def leave_out(self, slots: list[int], length: int) -> None:
        """Append `length` zeros to `slots`, for tokens without keys and values. No token attends to them."""
        for slot in slots:
            layer: Any = self.cache.layers[slot]
            key, value = (torch.zeros_like(t[:, :, :1]).expand(-1, -1, length, -1) for t in (layer.keys, layer.values))
            self.cache.update(key, value, slot)


class FirstKeysAndValues(DepthCache):
    """A view of one slot: the first recurrence writes its keys and values, and the others read them from `store`."""

    def __init__(self, cache: Cache, slot: int, store: dict[int, tuple[torch.Tensor, torch.Tensor]], first: bool):
        super().__init__(cache, slot)
        self._store, self._first = store, first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write keys and values [B, H, T, D] in the first recurrence; the first recurrence's, past ones included."""
        if self._first:
            self._store[self._slot] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._store[self._slot]
