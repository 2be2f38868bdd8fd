"""Attention of rows at mixed depths over a paged KV cache, its plain torch backend, and the choice of another.

Every (request, depth) is a virtual sequence: a request has one block table, and the blocks of another depth lie a
constant number of blocks further on. Rows of one request at one depth and at neighbouring positions, such as a
prompt's, form one *run* of queries.
Shapes: N rows, H query heads, K key-value heads, C head size, M runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Protocol

import torch


@dataclass
class Rows:
    """Which rows a call has. `tables` [requests, blocks] are the block tables; `request`, `position`, `slot` [N] say
    whose row it is, where, and which KV slot it has; `write` [N] whether it writes its keys and values (None: all).
    `alone`: no two rows are of one request. `fills`: `fill` may follow, for rows that write. `moved`: the rows are
    those of an earlier plan, each so many slots further on. `longest`: no row sees more positions; 0: not known."""

    tables: torch.Tensor
    request: torch.Tensor
    position: torch.Tensor
    slot: torch.Tensor
    write: torch.Tensor | None = None
    alone: bool = False
    fills: bool = False
    moved: tuple[Any, int] | None = None
    longest: int = 0

    def part(self, some: slice) -> Rows:
        """These rows of a call that is not a moved one."""
        write = None if self.write is None else self.write[some]
        ours = {"request": self.request[some], "position": self.position[some], "slot": self.slot[some]}
        return replace(self, **ours, write=write)


class Attention(Protocol):
    """What the engine asks of a backend. Layers are numbered prelude, coda, core, as the config's key-value slots."""

    def plan(self, rows: Rows) -> Any:
        """Prepare for calls with these rows; those of one request at one slot stand together, in order of position.
        Returns what `fill` wants to know of them."""
        ...

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
        """Write k, v [N, K, C] and attend with q [N, H, C] to the row's own position and all before -> [N, H, C].

        `facts` about the layer: scaling, sliding_window, softcap, sinks [H].
        """
        ...

    def fill(self, plan: Any, empty: torch.Tensor, count: int | None = None) -> None:
        """Write the keys and values that the rows of `plan` had in the core layers into the next `empty` [N] slots,
        too; `count` slots together, if the caller knows."""
        ...

    def clean(self, table: torch.Tensor) -> None:
        """Make 0 of the keys and values that are not finite in the blocks of `table` [blocks], in every slot."""
        ...


def clean(cache: torch.Tensor, table: torch.Tensor, shifts: Iterable[int]) -> None:
    """Make 0 of what is not finite in the blocks of `table` [blocks], and so many blocks behind each, of a cache [all
    blocks, ...]."""
    for shift in shifts:
        cache[table + shift] = cache[table + shift].nan_to_num(0.0, 0.0, 0.0)


def attention_for(device: torch.device) -> type:
    """The backend for a device: Triton's kernels, which come with torch, on a GPU; torch's operations elsewhere."""
    if device.type == "cuda":
        from .triton_attention import TritonAttention

        return TritonAttention
    return TorchAttention


def runs(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    """First row [M] and number of rows [M] of every run."""
    request, position, slot = rows.request, rows.position, rows.slot
    new = torch.ones_like(request, dtype=torch.bool)
    new[1:] = (request[1:] != request[:-1]) | (slot[1:] != slot[:-1]) | (position[1:] != position[:-1] + 1)
    first = new.nonzero().squeeze(1)
    return first, torch.diff(first, append=first.new_tensor([len(request)]))


def slots_after(empty: torch.Tensor, every: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `empty` [N] slots behind each row's own: the row of each, and which behind it, from 1. `every` is 0, 1, ...
    for each of them."""
    ends = empty.cumsum(0)
    rows = torch.searchsorted(ends, every, right=True)
    return rows, every - (ends - empty)[rows] + 1


class TorchAttention:
    """The reference backend: gathers what a run reads. Caches [blocks * slots, block size, K, C], slot-major."""

    def __init__(
        self, shapes: list[tuple[int, int]], outer: int, slots: int, blocks: int, block_size: int, like: torch.Tensor
    ):
        """`shapes`: (K, C) of every layer, of which the first `outer` are prelude and coda."""
        self.block_size, self.blocks, self.outer = block_size, blocks, outer
        self.caches = [
            tuple(like.new_zeros(blocks * (slots if n >= outer else 1), block_size, *shape) for _ in range(2))
            for n, shape in enumerate(shapes)
        ]
        self.current: _Plan | None = None

    def plan(self, rows: Rows) -> _Plan:
        size = self.block_size
        first, count = runs(rows)
        shift = rows.slot * self.blocks
        place = (rows.tables[rows.request, rows.position // size] + shift) * size + rows.position % size
        needed = int(rows.position.max()) // size + 1
        read = rows.tables[rows.request[first], :needed] + shift[first, None]
        within = torch.arange(int(count.max()), device=first.device)
        real = within < count[:, None]
        query = (first[:, None] + within).clamp(max=len(rows.request) - 1)
        keys = torch.arange(needed * size, device=first.device)
        self.current = _Plan(rows, place, read, query, real, rows.position[query][..., None] - keys)
        return self.current

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
        plan = self.current
        assert plan is not None
        if plan.rows.fills:  # a copy, as compiled code writes over k and v
            plan.kept[layer] = (k.clone(), v.clone())
        write = plan.rows.write
        for cache, new in zip(self.caches[layer], (k, v), strict=True):
            flat = cache.flatten(0, 1)
            if write is None:
                flat[plan.place] = new
            else:
                flat[plan.place[write]] = new[write]
        keys, values = (cache[plan.read].flatten(1, 2).transpose(1, 2) for cache in self.caches[layer])  # [M, K, T, C]
        groups = q.shape[1] // k.shape[1]
        keys, values = (t.repeat_interleave(groups, 1) for t in (keys, values))
        scores = (q[plan.query].transpose(1, 2) @ keys.transpose(-1, -2)) * facts["scaling"]  # [M, H, longest, T]
        if softcap := facts.get("softcap"):
            scores = (scores / softcap).tanh() * softcap
        hidden = plan.back < 0
        if window := facts.get("sliding_window"):
            hidden = hidden | (plan.back >= window)
        scores = scores.float().masked_fill(hidden[:, None], float("-inf"))
        if (sinks := facts.get("sinks")) is not None:
            scores = torch.cat([scores, sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
        p = scores.softmax(-1)[..., : keys.shape[2]].to(values.dtype)
        return (p @ values).transpose(1, 2)[plan.real]

    def fill(self, plan: _Plan, empty: torch.Tensor, count: int | None = None) -> None:
        count = int(empty.sum()) if count is None else count
        source, further = slots_after(empty, torch.arange(count, device=empty.device))
        place = plan.place[source] + further * self.blocks * self.block_size
        for layer, new in plan.kept.items():
            for cache, values in zip(self.caches[layer], new, strict=True):
                cache.flatten(0, 1)[place] = values[source]

    def clean(self, table: torch.Tensor) -> None:
        for cache in chain.from_iterable(self.caches):
            clean(cache, table, range(0, len(cache), self.blocks))


@dataclass
class _Plan:
    """`place` [N] of a row in a cache; blocks `read` [M, b] by every run; its rows `query` [M, longest], of which some
    are `real`; `back` [M, longest, T]: how far a key lies behind the query. `kept`: keys and values of every layer."""

    rows: Rows
    place: torch.Tensor
    read: torch.Tensor
    query: torch.Tensor
    real: torch.Tensor
    back: torch.Tensor
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
