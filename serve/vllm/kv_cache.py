"""vLLM's KV cache for lanes: its kind, its allocation, and what vLLM's attention backend makes of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.worker import utils


class Allocated(NamedTuple):
    """An allocated cache. caches: of each layer.   block_size: of attention's kernels.   split: their blocks in one of
    vLLM's scheduler.   builder: makes the metadata of the backend."""

    caches: list[torch.Tensor]
    block_size: int
    split: int
    builder: Any


def _attention_layers(vllm_config: VllmConfig) -> dict[str, Any]:
    kind: Any = AttentionLayerBase
    return get_layers_from_vllm_config(vllm_config, kind)


def kv_cache_spec(vllm_config: VllmConfig) -> dict[str, KVCacheSpec]:
    """One kind for all layers: positions behind the newest need blocks that a window has left."""
    names, found = ("block_size", "num_kv_heads", "head_size", "dtype"), {}
    for name, layer in _attention_layers(vllm_config).items():
        spec = layer.get_kv_cache_spec(vllm_config)
        found[name] = FullAttentionSpec(**{n: getattr(spec, n) for n in names})
    return found


def allocate(
    vllm_config: VllmConfig, config: KVCacheConfig, device: torch.device, context: AbstractContextManager | None
) -> Allocated:
    """Allocate the cache that `config` describes, in a `context` of the worker's, and give each layer its part.

    Raises ValueError for caches of several kinds, and for layers that attend by several backends.
    """
    if len(config.kv_cache_groups) != 1:
        raise ValueError(f"{len(config.kv_cache_groups)} groups of KV caches: lanes need one")
    (group,), layers = config.kv_cache_groups, _attention_layers(vllm_config)
    found = [layers[name].get_attn_backend() for name in group.layer_names]
    backends = {backend.full_cls_name(): backend for backend in found}
    if len(backends) != 1:
        raise ValueError(f"lanes need one attention backend for all layers, not {', '.join(backends)}")
    attention = utils.AttentionGroup(found[0], group.layer_names, group.kv_cache_spec, 0)
    sizes = utils.prepare_kernel_block_sizes(config, [[attention]])
    attention.create_metadata_builders(vllm_config, device, sizes[0])
    with context or nullcontext():
        layout = vllm_config.cache_config.get_resolved_kv_cache_layout()
        caches = utils.allocate_kv_cache(config, device, layout, sizes)
    views, kept = utils.map_kv_caches_to_kernel_blocks(caches, [attention]), list[torch.Tensor]()
    utils.bind_kv_cache(caches, vllm_config.compilation_config.static_forward_context, kept, layer_kv_caches=views)
    whole = group.kv_cache_spec.block_size
    size = attention.kernel_block_size or whole
    return Allocated(kept, size, whole // size, attention.get_metadata_builder())
