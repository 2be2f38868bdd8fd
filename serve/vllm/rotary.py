"""Rotary position embedding of vLLM's layers, taken over by the engine's kernels.

A kernel that reads a query or a key rotates it on the way. vLLM's own rotation is another kernel in every layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

from ..engine.attention.triton import Rotary
from .parts import VllmParts

ROWS = 4  # of the call that tries the layers


class Unrotated(nn.Module):
    """In the place of a layer's rotary embedding: queries and keys as they are."""

    def forward(self, positions: Tensor, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        return query, key


def take_rotary(parts: VllmParts, dtype: torch.dtype, device: torch.device) -> list[Rotary | None]:
    """The rotary embedding of each layer, by layer number, which the layer itself no longer applies.

    None for a layer that keeps its own: it has none of vLLM's plain kind, or changes queries or keys between rotation
    and attention. A call of all layers tells. A routed model's layers keep it: attention has the place of a token among
    the chosen ones, not its position.
    """
    if parts.router is not None:
        return [None] * len(parts.caches)
    layers = [layer for part in ("prelude", "coda", "core") for layer in parts.by_part[part]]
    places = [_place(layer) for layer in layers]
    seen = _Seen()
    several = {id(place[2]): place[2] for place in places if place}  # layers share them
    hooks = [rotary.register_forward_hook(seen.rotated) for rotary in several.values()]
    before, parts.attention = parts.attention, seen
    try:
        if hooks:
            _call(parts, dtype, device)
    finally:
        parts.attention = before
        for hook in hooks:
            hook.remove()
    tables = {
        key: Rotary(rotary.cos_sin_cache.to(device, dtype).contiguous(), rotary.is_neox_style)
        for key, rotary in several.items()
    }
    found: list[Rotary | None] = [None] * len(layers)
    for number in seen.unchanged:
        if place := places[number]:
            parent, name, rotary = place
            setattr(parent, name, Unrotated())
            found[number] = tables[id(rotary)]
    return found


@torch.inference_mode()
def _call(parts: VllmParts, dtype: torch.dtype, device: torch.device) -> None:
    """Run every layer once, on random states."""
    x = torch.randn(ROWS, parts.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    positions, depths = torch.arange(ROWS, device=device), torch.zeros(ROWS, dtype=torch.long, device=device)
    if parts.needs_tokens:
        parts.tokens = torch.zeros_like(positions)
    for part in parts.by_part:
        parts.layers(part, x.clone(), positions, depths, depths + 1)


def _place(layer: nn.Module) -> tuple[nn.Module, str, RotaryEmbedding] | None:
    """The module that holds the rotary embedding of `layer`, its name there, and the embedding.

    None where the layer has no embedding that the kernels know, or several.
    """
    found = [
        (parent, name, child)
        for parent in layer.modules()
        for name, child in parent.named_children()
        if isinstance(child, RotaryEmbedding)
    ]
    if len(found) != 1:
        return None
    rotary = found[0][2]
    methods = ("forward_native", "forward_static", "forward_cuda")
    plain = all(getattr(type(rotary), name) is getattr(RotaryEmbedding, name) for name in methods)
    return found[0] if plain and not rotary.use_flashinfer else None


class _Seen:
    """An attention that notes, as layers run one after another, which get just what their rotary embedding returned."""

    def __init__(self):
        self.last: list[tuple[Tensor, Tensor]] = []  # what was returned, and a copy
        self.unchanged: list[int] = []

    def rotated(self, module: nn.Module, args: Any, out: tuple[Tensor, Tensor | None]) -> None:
        self.last = [(tensor, tensor.clone()) for tensor in out if tensor is not None]

    def plan(self, rows: Any) -> None: ...

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, **facts: Any) -> Tensor:
        same = [
            ours.data_ptr() == theirs.data_ptr() and torch.equal(ours.flatten(), copy.flatten())
            for ours, (theirs, copy) in zip((q, k), self.last, strict=False)
        ]
        if same == [True, True]:
            self.unchanged.append(layer)
        self.last = []
        return torch.zeros_like(q)

    def fill(self, plan: Any, empty: Tensor, count: int | None = None) -> None: ...

    def clean(self, table: Tensor) -> None: ...
