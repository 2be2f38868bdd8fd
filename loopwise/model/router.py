"""Mixture-of-Recursions (arXiv 2507.10524): routers that choose which tokens take part in a recurrence.

Expert-choice: s_r = s_{r-1} + w_r(s_{r-1}) core(s_{r-1}) for the tokens chosen for recurrence r, w_r(s) =
alpha gate(W_r s). Token-choice: s_R = s_0 + w_d(s_0) h_d with h_0 = s_0, h_r = core(h_{r-1}) for a token of depth d,
the argmax of W s_0. A token that is not chosen keeps its state. Tokens that were chosen attend to each other (or, with
`kv="first-recursion"`, to the first recurrence's keys and values of all tokens).

Shapes: B batch, T tokens of this call, D width, R recurrences, K keys, N chosen tokens (of the fullest sequence).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

from .configuration_router import check_capacity
from .source_layers import DepthCache


@dataclass
class RouterOutputs(ModelOutput):
    """What objectives for routers need; float32 and bool, entries that are no candidates mean nothing.

    logits [B, T, R]: of each recurrence's router (expert), or of the router of all depths (token).
    auxiliary_logits [B, T, R]: of the auxiliary routers, if there are any; their input carries no gradient.
    candidates [B, T, R]: the tokens that the recurrence chose among. Padding never is one.
    selected [B, T, R]: the tokens that it ran.

    So the choice is predicted by binary cross-entropy of `logits[c]` (or `auxiliary_logits[c]`) and `selected[c]`, with
    c = candidates; a token's depth is `selected.sum(-1)`.
    """

    logits: torch.Tensor | None = None
    auxiliary_logits: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    selected: torch.Tensor | None = None


def _network(kind: str, width: int, out: int) -> nn.Module:
    if kind == "linear":
        return nn.Linear(width, out, bias=False)
    return nn.Sequential(nn.Linear(width, 2 * width, bias=False), nn.GELU(), nn.Linear(2 * width, out, bias=False))


class Router(nn.Module):
    """The networks of `config.router` (see `router_fields`): one for each recurrence (expert), or one for all (token).

    A token-choice router also holds `bias` [R], added to the probabilities where a depth is chosen and nowhere else:
    balancing without a loss moves it (arXiv 2408.15664).
    """

    def __init__(self, width: int, fields: dict[str, Any]):
        super().__init__()
        self.fields = fields
        expert = fields["kind"] == "expert"
        count, out = (fields["depths"], 1) if expert else (1, fields["depths"])
        self.networks = nn.ModuleList(_network(fields["network"], width, out) for _ in range(count))
        if fields.get("auxiliary"):
            self.auxiliary = nn.ModuleList(_network(fields["network"], width, out) for _ in range(count))
        if not expert:
            self.bias: torch.Tensor
            self.register_buffer("bias", torch.zeros(out))

    def start(self, std: float) -> None:
        for parameter in self.parameters():
            init.normal_(parameter, std=std)
        if self.fields["kind"] == "token":
            init.zeros_(self.bias)

    def begin(self, s: torch.Tensor, real: torch.Tensor, topk: Sequence[float] | None) -> Routing:
        """The routing of one call from s_0 [B, T, D], for tokens that are no padding where real [B, T]. With `topk`,
        the capacity of every recurrence, expert-choice takes the best of the sequence, else what passes a threshold."""
        if self.fields["kind"] == "token":
            return TokenChoice(self, s, real)
        return ExpertChoice(self, s, real, topk)

    def logits(self, network: nn.Module, s: torch.Tensor) -> torch.Tensor:
        """[B, T, R or 1], in the type of the weights whatever autocast says: a choice amplifies rounding."""
        with torch.autocast(s.device.type, enabled=False):
            return network((s / self.fields["temperature"]).to(next(network.parameters()).dtype)).float()


class Routing:
    """One call's choices, recurrence after recurrence: `select`, run the core on the chosen rows, `combine`."""

    def __init__(self, router: Router, s: torch.Tensor, real: torch.Tensor):
        self.router, self.start, self.real = router, s, real
        self.candidates: list[torch.Tensor] = []
        self.selected: list[torch.Tensor] = []

    def select(self, r: int, s: torch.Tensor) -> torch.Tensor:
        """Which tokens [B, T] recurrence r, counted from 0, takes from s [B, T, D]."""
        raise NotImplementedError

    def combine(self, r: int, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        """The new states of `rows`, which had the states x and for which the core gave y, [B, N, D]."""
        raise NotImplementedError

    def outputs(self) -> RouterOutputs:
        raise NotImplementedError


class ExpertChoice(Routing):
    def __init__(self, router: Router, s: torch.Tensor, real: torch.Tensor, topk: Sequence[float] | None):
        super().__init__(router, s, real)
        self.topk = topk
        self.logits: list[torch.Tensor] = []
        self.auxiliary: list[torch.Tensor] = []

    def select(self, r: int, s: torch.Tensor) -> torch.Tensor:
        router, fields = self.router, self.router.fields
        candidates = self.selected[-1] if self.selected else self.real
        logits = router.logits(router.networks[r], s).squeeze(-1)
        self.logits.append(logits)
        deciding = logits
        if fields["auxiliary"]:
            self.auxiliary.append(router.logits(router.auxiliary[r], s.detach()).squeeze(-1))
        if self.topk is not None:
            counts = (self.real.sum(1).double() * self.topk[r]).long().clamp(min=1)
            chosen = _best(logits.masked_fill(~candidates, -torch.inf), counts)
        else:
            deciding = self.auxiliary[-1] if self.auxiliary else logits
            chosen = torch.sigmoid(deciding) >= fields["thresholds"][r]
        self.candidates.append(candidates)
        self.selected.append(chosen & candidates)
        return self.selected[-1]

    def combine(self, r: int, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        gate = getattr(torch, self.router.fields["gate"])(self.logits[r]) * self.router.fields["alpha"]
        return x + rows.take(gate[..., None]).to(y.dtype) * y

    def outputs(self) -> RouterOutputs:
        return RouterOutputs(
            logits=torch.stack(self.logits, -1),
            auxiliary_logits=torch.stack(self.auxiliary, -1) if self.auxiliary else None,
            candidates=torch.stack(self.candidates, -1),
            selected=torch.stack(self.selected, -1),
        )


class TokenChoice(Routing):
    def __init__(self, router: Router, s: torch.Tensor, real: torch.Tensor):
        super().__init__(router, s, real)
        self.logits = router.logits(router.networks[0], s)
        gate = self.logits.softmax(-1) if router.fields["gate"] == "softmax" else self.logits.sigmoid()
        gate = gate * router.fields["alpha"]
        self.depth = (gate + router.bias.float()).argmax(-1)  # recurrences but one
        self.weight = gate.gather(-1, self.depth[..., None])

    def select(self, r: int, s: torch.Tensor) -> torch.Tensor:
        self.candidates.append(self.real)
        self.selected.append(self.real & (self.depth >= r))
        return self.selected[-1]

    def combine(self, r: int, x: torch.Tensor, y: torch.Tensor, rows: Rows) -> torch.Tensor:
        ends = rows.take(self.depth[..., None]) == r
        return torch.where(ends, rows.take(self.start) + rows.take(self.weight).to(y.dtype) * y, y)

    def outputs(self) -> RouterOutputs:
        return RouterOutputs(
            logits=self.logits, candidates=torch.stack(self.candidates, -1), selected=torch.stack(self.selected, -1)
        )


def _best(scores: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Where [B, T] the `counts` [B] greatest of scores [B, T] stand; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    among = torch.arange(scores.shape[1], device=scores.device) < counts[:, None]
    return torch.zeros_like(among).scatter(1, order, among)


def capacities(fields: dict[str, Any], given: Sequence[float] | None, training: bool) -> Sequence[float] | None:
    """The capacities of a call that takes the best of the sequence, None for one that goes by thresholds."""
    if given is not None:
        if fields["kind"] != "expert":
            raise ValueError("router_capacity is for expert-choice; every token of a token-choice router has its depth")
        check_capacity(list(given), fields["depths"])
        return given
    return fields["capacity"] if fields["kind"] == "expert" and (training or fields["inference"] == "topk") else None


class Rows:
    """The tokens of a call that a recurrence runs on.

    gather: the core gets only them, [B, N, D], which saves their share of the work; else it gets all tokens, of which
    the others are computed in vain: where a key-value cache needs a row for every token, and in architectures whose
    layers count positions themselves. hides: the layers' masks are true where a token is hidden, not where it is seen.
    """

    def __init__(self, selected: torch.Tensor, gather: bool, hides: bool = False):
        self.selected, self.gather, self.hides = selected, gather, hides
        if gather:
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


# Architectures whose layers take positions from the place of a token, not from an argument; and whose masks hide.
COUNTING = {"bloom", "gpt_neo", "mpt"}
HIDING = {"mpt"}


def counts_positions(source_config: Any) -> bool:
    return source_config.model_type in COUNTING or bool(getattr(source_config, "alibi", False))


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

    def add(self, routing: Routing, dtype: torch.dtype) -> None:
        """Note the choices of this call, once all its recurrences have run."""
        depths = routing.router.fields["depths"]
        chosen = torch.stack(routing.selected, -1).to(dtype)[:, None]
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
