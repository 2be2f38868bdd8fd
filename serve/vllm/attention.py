"""Attention of lanes on vLLM's paged KV cache, by whichever of vLLM's attention backends the platform has.

vLLM puts the caches of all layers of a group into one allocation. So the blocks of core layer l at depth d lie a
constant distance behind those at depth 0. One block table per request, shifted for each row, serves every depth: to the
backend, each (request, depth) is a sequence.
Shapes: N rows, H query heads, K key-value heads, C head size, M runs of rows.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.attention import Attention as Layer
from vllm.v1.attention.backend import CommonAttentionMetadata

from ..engine.attention.base import Rows, clean, runs, slots_after
from ..engine.compile import ALONE, compiled


class Plan(NamedTuple):
    """The plan of one call's rows.

    metadata: the backend's.   place [N]: each row's in the cache.   write [N]: the place that it writes; below 0: none.
    kept [core layers, 2, N, K, C]: the rows' keys and values, where `fill` may copy them; None elsewhere.
    """

    metadata: Any
    place: torch.Tensor
    write: torch.Tensor
    kept: torch.Tensor | None


class PagedAttention:
    """The engine's Attention over vLLM's cache.

    caches: vLLM's layers by layer number and slot; the first `outer` are prelude and coda.
    builder: makes the backend's metadata.   compile: compute places by compiled code.
    Raises ValueError where vLLM has placed caches in another way.
    """

    def __init__(self, caches: list[list[Layer]], outer: int, block_size: int, builder: Any, compile: bool = False):
        shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for slots in caches for layer in slots}
        if len(shapes) > 1:
            raise ValueError(f"layers of unlike (heads, key-value heads, head size) cannot share a cache: {shapes}")
        self.block_size, self.builder, self.compile = block_size, builder, compile
        self.layers: list[Any] = [slots[0] for slots in caches]
        views = [Whole.of(slots) for slots in caches]
        self.stride, self.scale = max(view.stride for view in views), views[0].scale
        if any(view.stride != self.stride for view in views[outer:]) or any(v.scale != self.scale for v in views):
            raise ValueError("the depths of all core layers must be equally far apart in vLLM's cache")
        self.caches, self.slots = [view.blocks for view in views], [len(slots) for slots in caches]
        first, every = [slots[0] for slots in caches[outer:]], [layer for slots in caches[outer:] for layer in slots]
        every.sort(key=lambda layer: layer.kv_cache.storage_offset())
        if every[0] is not first[0]:
            raise ValueError("the first layer of the core must come first in vLLM's cache")
        device = self.caches[0].device
        self.outer, self.core = outer, Whole.of(every).blocks  # caches of all core layers
        self.layer_shift = torch.arange(len(first), device=device)[:, None] * Whole.of(first).stride  # [core layers, 1]
        self.starts = torch.arange(1, dtype=torch.int32, device=device)
        self.tables: torch.Tensor | None = None
        self.filled = compiled(filled, **ALONE) if compile else filled
        self.current: Plan | None = None

    def plan(self, rows: Rows) -> Plan:
        """As Attention.plan, for `rows` [N] in M runs. Sets `current`.

        Builds the backend's metadata: block tables [M, b] of this depth, sequence lengths [M], places [N] that the rows
        write. For `rows.moved`, it changes the metadata of the earlier plan in place. May wait for the device.
        """
        if rows.moved and self._moves(*rows.moved):
            self.current = plan = rows.moved[0]._replace(kept=self._room(rows))
            return plan
        request, position = rows.request, rows.position
        if self.tables is not rows.tables:  # compiled code keeps the tables of its first call
            self.tables, self.located = rows.tables, compiled(located, **ALONE) if self.compile else located
        place, shift, seen = self.located(self, request, position, rows.slot)
        write = place if rows.write is None else torch.where(rows.write, place, -1)
        n, most = len(position), 1
        if rows.alone:
            if len(self.starts) <= n:
                self.starts = torch.arange(2 * n, dtype=torch.int32, device=position.device)
            starts = self.starts[: n + 1]
        else:
            first, count = runs(rows)
            starts = torch.zeros(len(first) + 1, dtype=torch.int32, device=position.device)
            torch.cumsum(count, 0, out=starts[1:])
            request, shift, seen, most = request[first], shift[first], seen[first + count - 1], int(count.max())
        longest = rows.longest or int(seen.max())
        tables = rows.tables[:, : (longest - 1) // self.block_size + 1].index_select(0, request)
        tables = (tables if self.scale == 1 else tables.mul_(self.scale)).add_(shift[:, None])
        common = CommonAttentionMetadata(
            query_start_loc=starts,
            query_start_loc_cpu=starts.cpu(),
            seq_lens=seen,
            num_reqs=len(seen),
            num_actual_tokens=n,
            max_query_len=most,
            max_seq_len=longest,
            block_table_tensor=tables,
            slot_mapping=write,
            causal=True,
        )
        self.current = Plan(self.builder.build(0, common), place, write, self._room(rows))
        return self.current

    def _room(self, rows: Rows) -> torch.Tensor | None:
        """Memory for `Plan.kept`."""
        if not rows.fills:
            return None
        last = self.layers[-1]
        shape = len(self.layer_shift), 2, len(rows.position), last.num_kv_heads, last.head_size
        return torch.empty(shape, dtype=last.dtype, device=rows.position.device)

    def _moves(self, plan: Plan, slots: int) -> bool:
        """Move a plan by so many slots, in place. Returns False where the backend does not keep its tensors."""
        shift = slots * self.stride
        tables, write = (getattr(plan.metadata, name, None) for name in ("block_table", "slot_mapping"))
        if tables is None or write is not plan.place:  # or a plan of rows that do not all write
            return False
        if shift:
            tables += shift
            plan.place.add_(shift * self.block_size)
        return True

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
        """Write k, v [N, K, C] and attend: q [N, H, C] -> [N, H, C]. `facts` are unused: vLLM's layer has them."""
        plan = self.current
        assert plan is not None, "attention before a plan"
        if plan.kept is not None and layer >= self.outer:  # a copy, as compiled code writes over k and v
            room = plan.kept[layer - self.outer]
            room[0].copy_(k)
            room[1].copy_(v)
        self.write(layer, k, v, plan.write)
        return self.read(layer, q, k, v, plan.metadata)

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, where: torch.Tensor) -> None:
        """Write keys and values [n, K, C] to places [n] of a layer's cache; layer -1: of all core layers as one."""
        module, cache = self.layers[layer], self.core if layer < 0 else self.caches[layer]
        module.impl.do_kv_cache_update(module, k, v, cache, where)

    def read(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: Any) -> torch.Tensor:
        """Attention of queries [N, H, C] over a layer's cache, which holds their own k, v already. -> [N, H, C]"""
        module, out = self.layers[layer], q.new_empty(q.shape)
        module.impl.forward(module, q, k, v, self.caches[layer], metadata, out)
        return out

    def fill(self, plan: Plan, empty: torch.Tensor, count: int | None = None) -> None:
        """Write a plan's keys and values to the `empty` [N] slots behind each row's; `count`: their sum, if known.

        By the kernel that writes the cache: some backends pack keys within a block, so places cannot be copied. All
        layers are written at once, as their caches are equally far apart.
        """
        assert plan.kept is not None, "fill of rows that were planned without"
        every = torch.arange(int(empty.sum()) if count is None else count, device=empty.device)
        self.write(-1, *self.filled(self, plan.place, empty, every, plan.kept.flatten(0, 2)))

    def clean(self, table: torch.Tensor) -> None:
        """Clear NaNs in the blocks of `table`, at all slots of all layers."""
        for cache, slots in zip(self.caches, self.slots, strict=True):
            clean(cache, table * self.scale, [slot * self.stride for slot in range(slots)])


def located(
    attention: PagedAttention, request: torch.Tensor, position: torch.Tensor, slot: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For rows [N]: their place in a cache, their slot's distance in blocks, and the number of positions they see."""
    size, shift = attention.block_size, slot * attention.stride
    assert attention.tables is not None
    block = attention.tables[request, position // size].long() * attention.scale + shift
    return block * size + position % size, shift.int(), (position + 1).int()


def filled(
    attention: PagedAttention, place: torch.Tensor, empty: torch.Tensor, every: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For rows at places [N] with `empty` [N] slots behind each: keys and values [L M, K, C], and their places [L M].

    L core layers, M empty slots in all: `every` [M] numbers them. kept [L 2 N, K, C]: keys and values of the rows.
    """
    source, further = slots_after(empty, every)
    blocks = attention.layer_shift + further * attention.stride
    layers = torch.arange(len(attention.layer_shift), device=place.device)[:, None] * 2
    k, v = (kept[((layers + n) * len(place) + source).flatten()] for n in range(2))
    return k, v, (place[source] + blocks * attention.block_size).flatten()


class Whole(NamedTuple):
    """The cache of one layer from its first slot to its last, as one tensor of blocks.

    Block b of vLLM's table is block `scale` * b here. The same block of the next slot lies `stride` blocks behind.
    """

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
