"""Attention of lanes on CPUs by vLLM's operations, without its backend.

The Python of the backend around them, in every layer of every pass, takes a sixth of a small pass's attention.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.attention import Attention as Layer
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from .attention import PagedAttention


class Facts(NamedTuple):
    """The arguments of the operations that do not depend on the rows, for one layer."""

    keys: torch.Tensor
    values: torch.Tensor
    isa: str
    cache: tuple[float, float, str]  # scales of keys and values, and the cache's type
    scale: float
    slopes: torch.Tensor | None
    window: int
    softcap: float
    sinks: torch.Tensor | None

    @classmethod
    def of(cls, layer: Any, cache: torch.Tensor) -> Facts:
        """The values of vLLM's backend, for `cache` [blocks, K, block size, 2 C]."""
        blocks, heads, size, _ = cache.shape
        keys, values = cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2)
        impl = layer.impl
        kind = layer._k_scale_float, layer._v_scale_float, impl.kv_cache_dtype
        sinks = impl.sinks if impl.sinks is None or impl.sinks.dtype == torch.bfloat16 else impl.sinks.float()
        known = impl.scale, impl.alibi_slopes, impl.sliding_window, impl.logits_soft_cap, sinks
        return cls(keys, values, layer.isa, kind, *known)


class PagedCPU(PagedAttention):
    """PagedAttention by vLLM's CPU operations."""

    def __init__(self, caches: list[list[Layer]], *args: Any):
        """Raises ValueError for layers that attend by another backend."""
        super().__init__(caches, *args)
        if others := {type(layer.impl) for layer in self.layers} - {CPUAttentionBackendImpl}:
            raise ValueError(
                f"layers with attention by {others}: on a CPU, lanes need {CPUAttentionBackendImpl.__name__}"
            )
        ops = torch.ops._C
        self.update, self.attend = ops.cpu_attn_reshape_and_cache.default, ops.cpu_attention_with_kv_cache.default
        pairs = zip([*self.layers, self.layers[-1]], [*self.caches, self.core], strict=True)
        self.facts = [Facts.of(layer, cache) for layer, cache in pairs]

    def write(self, layer: int, k: torch.Tensor, v: torch.Tensor, where: torch.Tensor) -> None:
        facts = self.facts[layer]
        self.update(k, v, facts.keys, facts.values, where, facts.isa, *facts.cache)

    def read(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, metadata: Any) -> torch.Tensor:
        facts, rows, out = self.facts[layer], metadata, q.new_empty(q.shape)
        self.attend(
            q, facts.keys, facts.values, out, rows.query_start_loc, rows.seq_lens, facts.scale, rows.causal,
            facts.slopes, facts.window, rows.block_table, facts.softcap, rows.scheduler_metadata, facts.sinks,
            rows.dynamic_causal, *facts.cache,
        )  # fmt: skip
        return out
