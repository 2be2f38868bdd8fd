"""The memory of the largest pass and read-out, before there are keys and values.

vLLM measures it to size the KV cache. Its own forward would run nothing between embedding and head.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from ..engine.forward import Forward
from ..engine.sampling import Draws
from ..engine.state import State


class Blind:
    """Attention to nothing, without a cache: the memory of its output alone."""

    def plan(self, rows: Any) -> None:
        """Nothing to plan."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: Any) -> torch.Tensor:
        """q [N, H, C] -> [N, H, C], without values."""
        return torch.empty_like(q)


@torch.inference_mode()
def run_largest(parts: Any, state: State, device: torch.device) -> None:
    """Run all lanes of a `state`, on the meta device, through `parts` once, and sample the most tokens of a read-out.

    Compiled passes take less. The attention of `parts` is as before afterwards.
    """
    config = state.config
    decoding = min(state.num_decode_lanes, config.max_lanes or state.num_decode_lanes)
    zeros = torch.zeros(decoding + config.max_num_batched_tokens, dtype=torch.long, device=device)
    before, parts.attention = parts.attention, (blind := Blind())
    layer = parts.caches[-1][0]
    shape = len(parts.caches) - parts.outer, 2, len(zeros) * state.policy.fills, layer.num_kv_heads, layer.head_size
    try:
        kept = torch.empty(shape, dtype=layer.dtype, device=device)  # keys and values that fill other slots afterwards
        forward: Any = Forward(parts, blind, torch.zeros(1, 1, dtype=torch.int32, device=device), 1)  # pyright: ignore[reportArgumentType]
        e = forward.prelude(zeros, zeros, zeros)
        s = forward.recur(forward.initial_state(e, zeros), e, zeros, zeros > 0, zeros + 1, zeros)
        del kept
        x = forward.read_out(s, zeros, zeros)[: config.most_read]
        rows = torch.arange(len(x), device=device) % config.max_num_seqs
        logits, best = forward.head(x)
        Draws(config.max_num_seqs, device)(logits, best, rows, zeros[: len(x)], Counter(cut=1))
    finally:
        parts.attention = before
