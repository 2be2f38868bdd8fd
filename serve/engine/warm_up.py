"""Compile everything before the first request, by a pass at the first position of block 0."""

from __future__ import annotations

import torch

from . import transitions
from .attention.base import Rows
from .forward import Forward
from .state import State
from .transitions.steps import Steps


def warm_up(state: State, forward: Forward, steps: Steps) -> None:
    """Call every compiled function once, with distinct tensors of lengths 3 and 2, on a State without requests."""
    fills, two = state.policy.fills, torch.arange(2, device=state.device)
    s, at = state.lanes.s.new_zeros(3, state.lanes.s.shape[1]), torch.zeros(3, dtype=torch.long, device=state.device)
    plan = forward.plan(Rows(forward.block_table, at, at.clone(), at.clone(), at > 0, fills=fills))
    for recur in (forward.recur, forward.recur_alike)[: 1 + forward.has_lora]:
        recur(s, s.clone(), at.clone(), at > 0, at + 1, at)
    if fills:  # two slots behind three rows, as lengths must differ
        forward.attention.fill(plan, torch.arange(3, device=state.device).clamp(max=1), 2)
    forward.embed(at, at.clone())
    forward.logits(s)
    forward.head(s)
    steps.choose(state)
    row, position, depth, begun, _, _, s, _ = steps.enter(state, two)
    steps.settle(state, two, row, position, depth, s, begun)
    steps.fetch(state, two)
    steps.emit(state, two, row, position, depth)
    steps.start(state, two, row, position, depth, two >= 0, s, s.clone())
    transitions.padding.clear_flags(state)
