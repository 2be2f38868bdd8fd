"""Attention of lanes on vLLM's paged KV cache, by whichever of vLLM's attention backends the platform has.

vLLM puts the caches of all layers of a group into one allocation. Core layer l at depth d is therefore, block by block,
a constant distance behind the same layer at depth 0, and one block table a request, shifted for each row, serves every
depth: each (request, depth) is a sequence of its own to the backend.
Shapes: N rows, H query heads, K key-value heads, C head size, M runs of rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.attention import Attention as Layer
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..engine.attention import Rows, runs


class Plan(NamedTuple):
    """Of one call's rows: the backend's metadata, the place in the cache of each row [N], and what each writes [N]
    (below 0: nothing). `kept`: keys and values [2, N, K, C] that core layers were given, if `fill` may want them."""

    metadata: Any
    place: torch.Tensor
    write: torch.Tensor
    kept: dict[int, torch.Tensor] | None


class PagedAttention:
    """The engine's Attention over `caches`: vLLM's layers by the engine's number, each by slot; the first `outer` are
    prelude and coda. `builder` makes the backend's metadata."""

    def __init__(self, caches: list[list[Layer]], outer: int, block_size: int, builder: Any):
        shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for slots in caches for layer in slots}
        if len(shapes) > 1:
            raise ValueError(f"layers of unlike (heads, key-value heads, head size) cannot share a cache: {shapes}")
        self.block_size, self.builder = block_size, builder
        self.layers: list[Any] = [slots[0] for slots in caches]
        views = [Whole.of(slots) for slots in caches]
        self.stride, self.scale = max(view.stride for view in views), views[0].scale
        if any(view.stride != self.stride for view in views[outer:]) or any(v.scale != self.scale for v in views):
            raise ValueError("the depths of all core layers must be equally far apart in vLLM's cache")
        self.caches = [view.blocks for view in views]
        self.current: Plan | None = None

    def plan(self, rows: Rows) -> Plan:
        size, request, position = self.block_size, rows.request, rows.position
        shift = rows.slot * self.stride
        place = (rows.tables[request, position // size].long() * self.scale + shift) * size + position % size
        write = place if rows.write is None else torch.where(rows.write, place, -1)
        ends, most = position, 1
        if rows.alone:
            starts = torch.arange(len(position) + 1, dtype=torch.int32, device=position.device)
        else:
            first, count = runs(rows)
            starts = torch.zeros(len(first) + 1, dtype=torch.int32, device=position.device)
            torch.cumsum(count, 0, out=starts[1:])
            request, shift, ends, most = request[first], shift[first], position[first + count - 1], int(count.max())
        longest = int(position.max()) + 1
        tables = rows.tables[request, : (longest - 1) // size + 1] * self.scale + shift[:, None].int()
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=(ends + 1).int(),
            num_reqs=len(ends),
            num_actual_tokens=len(position),
            max_query_len=most,
            max_seq_len=longest,
            block_table_tensor=tables,
            slot_mapping=write,
            causal=True,
        )
        self.current = Plan(self.builder.build(0, common), place, write, {} if rows.fills else None)
        return self.current

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
        """`facts` are known to vLLM's layer."""
        plan, of, cache = self.current, self.layers[layer], self.caches[layer]
        assert plan is not None, "attention before a plan"
        if plan.kept is not None:  # a copy, as compiled code writes over k and v
            plan.kept[layer] = torch.stack([k, v])
        of.impl.do_kv_cache_update(of, k, v, cache, plan.write)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        of.impl.forward(of, q, k, v, cache, plan.metadata, out)
        return out

    def fill(self, plan: Plan, which: torch.Tensor, empty: torch.Tensor) -> None:
        """Through the kernel that writes the cache: some pack keys within a block, so places cannot be copied."""
        source = which.repeat_interleave(empty)
        nth = torch.arange(len(source), device=which.device) - (empty.cumsum(0) - empty).repeat_interleave(empty)
        place = plan.place[source] + (nth + 1) * self.stride * self.block_size
        assert plan.kept is not None, "rows that fills were not announced for"
        for layer, kept in plan.kept.items():
            of, (k, v) = self.layers[layer], kept.index_select(1, source)
            of.impl.do_kv_cache_update(of, k, v, self.caches[layer], place)


class Whole(NamedTuple):
    """The cache of one layer from its first slot to its last, as one tensor of blocks: a block of vLLM's table is block
    `scale` b of it, and the next slot's is `stride` blocks further on."""

    blocks: torch.Tensor
    stride: int
    scale: int

    @classmethod
    def of(cls, slots: list[Layer]) -> Whole:
        """Raises ValueError where vLLM has placed the slots' caches in another way."""
        caches: list[torch.Tensor] = [layer.kv_cache for layer in slots]
        first = caches[0]
        page, between = first[0].numel(), first.stride(0)
        steps = {int(b.storage_offset()) - int(a.storage_offset()) for a, b in pairwise(caches)}
        same = {cache.untyped_storage().data_ptr() for cache in caches}
        if len(steps) > 1 or len(same) > 1 or any(step % page or step < 0 for step in (between, *steps)):
            raise ValueError(
                f"vLLM's caches of a layer's depths stand {sorted(steps)} elements apart and its blocks {between}; "
                f"both must be multiples of a block's {page}"
            )
        stride, scale = (steps.pop() // page if steps else 0), between // page
        count = (first.shape[0] - 1) * scale + (len(slots) - 1) * stride + 1
        strides = (page, *first.stride()[1:])
        return cls(torch.as_strided(first, (count, *first.shape[1:]), strides, first.storage_offset()), stride, scale)
