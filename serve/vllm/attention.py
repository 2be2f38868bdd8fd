"""Attention of lanes on vLLM's paged KV cache, by vLLM's own kernels for CPUs.

vLLM puts the caches of all layers of a group into one allocation, layer after layer. Core layer l at depth d is
therefore, block by block, a constant number of blocks behind the same layer at depth 0, and one block table a request,
shifted for each row, serves every depth. Shapes: N rows, H query heads, K key-value heads, C head size, M runs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.model_executor.layers.attention import Attention as Layer
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from ..engine.attention import Rows, runs


class Plan(NamedTuple):
    """Of one call's rows: starts [M + 1], lengths of context [M], block tables [M, B] at the row's slot, and the place
    in the cache [N] that each row writes (below 0: none). `kept`: what core layers were given, for `fill`."""

    starts: torch.Tensor
    lengths: torch.Tensor
    tables: torch.Tensor
    place: torch.Tensor
    write: torch.Tensor
    kernel: torch.Tensor
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]]


class CpuAttention:
    """The engine's Attention over `caches`: vLLM's layers by the engine's number, each by slot; the first `outer` are
    prelude and coda."""

    def __init__(self, caches: list[list[Layer]], outer: int, block_size: int, dtype: torch.dtype):
        first = caches[0][0]
        shapes = {(layer.num_heads, layer.num_kv_heads, layer.head_size) for slots in caches for layer in slots}
        if len(shapes) > 1:
            raise ValueError(f"layers of unlike (heads, key-value heads, head size) cannot share a cache: {shapes}")
        self.heads, self.kv_heads, self.size = first.num_heads, first.num_kv_heads, first.head_size
        self.outer, self.block_size, self.dtype = outer, block_size, dtype
        self.isa = _get_attn_isa(dtype, block_size, self.size)
        views = [_whole(slots, block_size) for slots in caches]
        self.stride = max((stride for _, stride in views), default=0)
        if any(stride != self.stride for _, stride in views[outer:]):
            raise ValueError("the depths of all core layers must be equally far apart in vLLM's cache")
        self.caches = [whole.view(len(whole), self.kv_heads, block_size * 2, -1).chunk(2, dim=2) for whole, _ in views]
        self.plan_: Plan | None = None

    def plan(self, rows: Rows) -> Plan:
        size, request, position = self.block_size, rows.request, rows.position
        first, count = runs(rows)
        shift = (rows.slot * self.stride).int()
        place = (rows.tables[request, position // size] + shift).long() * size + position % size
        needed = int(position.max()) // size + 1
        starts = torch.zeros(len(first) + 1, dtype=torch.int32)
        torch.cumsum(count, 0, out=starts[1:])
        lengths = (position[first + count - 1] + 1).int()
        kernel = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(first),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.size,
            seq_lens=lengths,
            dtype=self.dtype,
            query_start_loc=starts,
            causal=True,
            sliding_window_size=-1,  # layers may have windows or not; it only says what could be skipped
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )
        tables = rows.tables[request[first], :needed] + shift[first, None]
        write = place if rows.write is None else torch.where(rows.write, place, -1)
        self.plan_ = Plan(starts, lengths, tables, place, write, kernel, {})
        return self.plan_

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
        plan, (keys, values) = self.plan_, self.caches[layer]
        assert plan is not None, "attention before a plan"
        if layer >= self.outer:
            plan.kept[layer] = k, v
        ops.cpu_attn_reshape_and_cache(k, v, keys, values, plan.write, self.isa)
        out = torch.empty(q.shape, dtype=q.dtype)
        window = facts["sliding_window"]
        ops.cpu_attention_with_kv_cache(
            query=q,
            key_cache=keys,
            value_cache=values,
            output=out,
            query_start_loc=plan.starts,
            seq_lens=plan.lengths,
            scale=facts["scaling"],
            causal=True,
            alibi_slopes=None,
            sliding_window=-1 if window is None else window,
            block_table=plan.tables,
            softcap=facts["softcap"] or 0.0,
            scheduler_metadata=plan.kernel,
            s_aux=facts["sinks"],
        )
        return out

    def fill(self, plan: Plan, which: torch.Tensor, empty: torch.Tensor) -> None:
        """Through the kernel that writes the cache: it packs keys within a block, so places cannot be copied."""
        source = which.repeat_interleave(empty)
        nth = torch.arange(len(source)) - (empty.cumsum(0) - empty).repeat_interleave(empty)
        place = plan.place[source] + (nth + 1) * self.stride * self.block_size
        for layer, (k, v) in plan.kept.items():
            keys, values = self.caches[layer]
            ops.cpu_attn_reshape_and_cache(k[source], v[source], keys, values, place, self.isa)


def _whole(slots: list[Layer], block_size: int) -> tuple[torch.Tensor, int]:
    """The cache of one layer from its first slot to its last, as one tensor of blocks, and the blocks between slots."""
    caches: list[torch.Tensor] = [layer.kv_cache for layer in slots]
    first = caches[0]
    if not first.is_contiguous() or first.shape[2] != block_size:
        raise ValueError(f"vLLM's cache of a layer has shape {list(first.shape)}, strides {list(first.stride())}")
    page = first[0].numel()
    steps = {b.storage_offset() - a.storage_offset() for a, b in pairwise(caches)}
    same = {cache.untyped_storage().data_ptr() for cache in caches}
    if len(steps) > 1 or len(same) > 1 or any(step % page or step < 0 for step in steps):
        raise ValueError(f"the depths of a layer stand {steps} elements apart in vLLM's cache, blocks have {page}")
    stride = int(steps.pop()) // page if steps else 0
    blocks = stride * (len(slots) - 1) + first.shape[0]
    return torch.as_strided(first, (blocks, *first.shape[1:]), first.stride(), first.storage_offset()), stride
