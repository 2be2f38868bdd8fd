"""The tokens that a recurrence runs on, where a router leaves others out: their rows, masks, and keys and values.

Shapes: B batch, T tokens of this call, D width, R recurrences, K keys, N chosen tokens (of the fullest sequence).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache

from .source_layers import DepthCache

# Architectures whose layers take positions from the place of a token, not from an argument; and whose masks hide.
COUNTING = {"bloom", "gpt_neo", "mpt"}
HIDING = {"mpt"}


class Rows:
    """The tokens of a call that a recurrence runs on.

    gather: the core gets only them, [B, N, D], which saves the others' work; else it gets all tokens, where a key-value
    cache needs a row for every one. So it does in architectures whose layers count positions themselves.
    """

    def __init__(self, selected: torch.Tensor, gather: bool, source_config: Any):
        counting = source_config.model_type in COUNTING or bool(getattr(source_config, "alibi", False))
        self.selected, self.gather = selected, gather and not counting
        self.hides = source_config.model_type in HIDING
        if self.gather:
            length = selected.shape[1]
            places = torch.arange(length, device=selected.device).expand_as(selected)
            counts = selected.sum(1)
            most = max(int(counts.max()), 1)
            self.index = torch.where(selected, places, length).sort(dim=1).values[:, :most]  # [B, N], then `length`
            self.full = bool((counts == most).all())

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Of x [B, T, D] the rows [B, N, D]."""
        if not self.gather:
            return x
        return x.gather(1, self.index.clamp(max=x.shape[1] - 1)[..., None].expand(-1, -1, x.shape[-1]))

    def put(self, x: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] with the rows replaced by `new`."""
        if not self.gather:
            return torch.where(self.selected[..., None], new, x)
        index = self.index[..., None].expand(-1, -1, x.shape[-1])
        if self.full:
            return x.scatter(1, index, new)
        return F.pad(x, (0, 0, 0, 1)).scatter(1, index, new)[:, :-1]

    def arguments(self, given: dict[str, Any], keys: torch.Tensor | None, past: int, offset: int) -> dict[str, Any]:
        """A layer's arguments for these rows of T tokens after `past` others.

        keys [B, past + T]: which tokens have keys and values at this recurrence; None means all. `offset` is the number
        of the first token that the layer's cache still holds.
        """
        mask = given["attention_mask"]
        if not self.gather:
            return given if keys is None else {**given, "attention_mask": self._among(mask, keys, past, offset)}
        batch, changed = len(self.selected), {}
        if keys is None:
            changed["attention_mask"] = self._of_rows(self._spelled_out(mask, past))
        elif mask is not None:  # else causal among themselves: the rows that fill up stand last
            changed["attention_mask"] = self._of_rows_and_columns(mask)
        if given.get("position_ids") is not None:
            changed["position_ids"] = self.take(given["position_ids"].expand(batch, -1)[..., None]).squeeze(-1)
        if given.get("position_embeddings") is not None:
            tables = given["position_embeddings"]
            changed["position_embeddings"] = tuple(self.take(table.expand(batch, -1, -1)) for table in tables)
        return {**given, **changed}

    def _spelled_out(self, mask: torch.Tensor | None, past: int) -> torch.Tensor:
        """[B, 1 or H, T, K]; transformers leaves out a mask that is causal."""
        batch, length = self.selected.shape
        if mask is None:
            ones = torch.ones(length, past + length, dtype=torch.bool, device=self.selected.device)
            mask = ones.tril(past)[None, None]
        return mask.expand(batch, -1, -1, -1)

    def _among(self, mask: torch.Tensor | None, keys: torch.Tensor, past: int, offset: int) -> torch.Tensor:
        """All rows, and of the columns those in `keys`; so that it stays finite, every row attends to itself."""
        mask = self._spelled_out(~mask if self.hides and mask is not None else mask, past)
        seen = F.pad(keys[:, offset:], (0, mask.shape[-1] - keys.shape[1] + offset))
        own = torch.arange(keys.shape[1] - past, device=keys.device)[:, None] + past - offset
        own = own == torch.arange(mask.shape[-1], device=keys.device)
        among = _allow(_forbid(mask, ~seen[:, None, None]), own)
        return ~among if self.hides else among

    def _of_rows(self, mask: torch.Tensor) -> torch.Tensor:
        index = self.index.clamp(max=mask.shape[2] - 1)[:, None, :, None]
        return mask.gather(2, index.expand(-1, mask.shape[1], -1, mask.shape[-1]))

    def _of_rows_and_columns(self, mask: torch.Tensor) -> torch.Tensor:
        """The rows among themselves. Those that only fill up are seen by none but themselves."""
        filling = (self.index == mask.shape[2])[:, None]
        mask = self._of_rows(self._spelled_out(mask, 0))
        index = self.index.clamp(max=mask.shape[3] - 1)[:, None, None, :]
        mask = mask.gather(3, index.expand(-1, *mask.shape[1:3], -1))
        own = torch.eye(mask.shape[2], dtype=torch.bool, device=mask.device)
        return _allow(_forbid(mask, filling[:, :, None]), filling[..., None] & own)


def _forbid(mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return mask & ~where if mask.dtype == torch.bool else mask.masked_fill(where, torch.finfo(mask.dtype).min)


def _allow(mask: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    return mask | where if mask.dtype == torch.bool else mask.masked_fill(where, 0)


def by_name(layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a layer, all by name; the first, the hidden states, is left out."""
    names = list(inspect.signature(layer.forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


class ChoiceSlot:
    """The slot of a cache that holds, for every token so far, at which recurrences it has keys and values.

    It is one more layer of the cache, so that whatever reorders, repeats or crops a cache does it to the choices too.
    """

    def __init__(self, cache: Cache, slot: int, past: int):
        self.cache, self.slot, self.past = cache, slot, past

    def keys(self, r: int, selected: torch.Tensor) -> torch.Tensor:
        """Which of the tokens so far recurrence r has run, those of this call among them: [B, past + T]."""
        if not self.past:
            return selected
        layer: Any = self.cache.layers[self.slot]
        return torch.cat([layer.keys[:, 0, : self.past, r] > 0, selected], dim=1)

    def add(self, selected: list[torch.Tensor], depths: int, dtype: torch.dtype) -> None:
        """Note the choices [B, T] of this call's recurrences, once all have run, of `depths` that there could be."""
        chosen = torch.stack(selected, -1).to(dtype)[:, None]
        chosen = F.pad(chosen, (0, depths - chosen.shape[-1]))
        self.cache.update(chosen, chosen, self.slot)

    def leave_out(self, slots: list[int], length: int) -> None:
        """Fill up `slots`, in which no token of this call has keys and values: nothing attends to them."""
        for slot in slots:
            layer: Any = self.cache.layers[slot]
            key, value = (torch.zeros_like(t[:, :, :1]).expand(-1, -1, length, -1) for t in (layer.keys, layer.values))
            self.cache.update(key, value, slot)


class FirstKeysAndValues(DepthCache):
    """A view of one slot in which the first recurrence's keys and values are written, and that others read."""

    def __init__(self, cache: Cache, slot: int, store: dict[int, Any], first: bool):
        super().__init__(cache, slot)
        self._store, self._first = store, first

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        if self._first:
            self._store[self._slot] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return self._store[self._slot]
