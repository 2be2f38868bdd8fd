"""The engine's Triton kernels on vLLM's paged KV cache.

Unlike vLLM's backends they need no per-call metadata, so a whole tick can be a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention as Layer

from ..engine.attention.triton import Rotary, TritonAttention


class PagedTriton(TritonAttention):
    """The engine's Attention over vLLM's cache."""

    def __init__(self, caches: list[list[Layer]], outer: int, block_size: int, rotary: list[Rotary | None]):
        """caches: vLLM's layers by layer number and slot; the first `outer` are prelude and coda.   rotary: of layers
        whose queries and keys come as they were before it.

        Raises ValueError for layers, or a cache layout, that the kernels do not support.
        """
        layers: list[Any] = [slots[0] for slots in caches]
        for layer in layers:
            if getattr(layer.impl, "alibi_slopes", None) is not None or layer.kv_cache.dtype != layer.dtype:
                raise ValueError(f"{layer.layer_name}: attention with ALiBi, or a KV cache of another type than states")
        self.take([[_views(layer) for layer in slots] for slots in caches], outer)
        if self.block_size != block_size:
            raise ValueError(f"vLLM's cache has blocks of {self.block_size} positions, its tables of {block_size}")
        self.facts = [
            {
                "scaling": layer.impl.scale,
                "sliding_window": layer.sliding_window,
                "softcap": getattr(layer.impl, "logits_soft_cap", None),
                "sinks": getattr(layer.impl, "sinks", None),
                "rotary": turned,
            }
            for layer, turned in zip(layers, rotary, strict=True)
        ]

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **_: Any) -> torch.Tensor:
        return super().__call__(layer, q, k, v, **self.facts[layer])


def _views(layer: Layer) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of keys and values, [blocks, block size, K, C], in a layer's cache [blocks, K, block size, 2 C]."""
    cache, size = layer.kv_cache, layer.head_size
    if cache.dim() != 4 or (cache.shape[1], cache.shape[3]) != (layer.num_kv_heads, 2 * size):
        raise ValueError(f"vLLM's cache of {layer.num_kv_heads} heads of size {size} has shape {list(cache.shape)}")
    keys, values = cache.transpose(1, 2).split(size, dim=-1)
    return keys, values
