"""The reference backend, in plain torch.

Shapes: N rows, H query heads, K key-value heads, C head size, M runs, T positions that a run reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .base import Rows, clean, runs, slots_after


class TorchAttention:
    """The reference backend: gathers the blocks of every run. Caches [blocks * slots, block size, K, C], slot-major."""

    def __init__(
        self, shapes: list[tuple[int, int]], outer: int, slots: int, blocks: int, block_size: int, like: Tensor
    ):
        """`shapes`: (K, C) of every layer, of which the first `outer` are prelude and coda."""
        self.block_size, self.blocks, self.outer = block_size, blocks, outer
        self.caches = [
            tuple(like.new_zeros(blocks * (slots if n >= outer else 1), block_size, *shape) for _ in range(2))
            for n, shape in enumerate(shapes)
        ]
        self.current: _Plan | None = None

    def plan(self, rows: Rows) -> _Plan:
        """As Attention.plan, for `rows` [N]. Sets `current`. Waits for the device: shapes depend on the runs."""
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

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **facts: Any) -> Tensor:
        plan = self.current
        assert plan is not None
        if plan.rows.fills:  # a copy, as compiled code overwrites k and v
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

    def fill(self, plan: _Plan, empty: Tensor, count: int | None = None) -> None:
        count = int(empty.sum()) if count is None else count
        source, further = slots_after(empty, torch.arange(count, device=empty.device))
        place = plan.place[source] + further * self.blocks * self.block_size
        for layer, new in plan.kept.items():
            for cache, values in zip(self.caches[layer], new, strict=True):
                cache.flatten(0, 1)[place] = values[source]

    def clean(self, table: Tensor) -> None:
        for cache in chain.from_iterable(self.caches):
            clean(cache, table, range(0, len(cache), self.blocks))


@dataclass
class _Plan:
    """place [N]: of a row in a cache.   read [M, b]: blocks of every run.   query, real [M, longest]: its rows, padded.
    back [M, longest, T]: how far a key lies behind the query.   kept: keys and values [N, K, C] of every layer."""

    rows: Rows
    place: Tensor
    read: Tensor
    query: Tensor
    real: Tensor
    back: Tensor
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
