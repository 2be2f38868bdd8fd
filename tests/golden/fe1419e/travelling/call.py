"""What one forward call asks of the recurrence. Shapes: B batch, T tokens of this call, D width, R recurrences."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .router import Routing

OPTIONS = (
    "num_recurrences", "grad_recurrences", "initial_state", "sequence_ids", "output_states", "output_depth_logits",
    "depth_loss", "depth_loss_at", "router_capacity",
)  # fmt: skip


class Place(NamedTuple):
    """One run of a layer: which source layer's arguments and which key-value slot it gets."""

    layer: nn.Module
    source_layer: int
    slot: int
    depth: int | None = None  # of a core layer, counted from 0


@dataclass
class Call:
    """What one forward call asks of the recurrence, and what it leaves behind."""

    num_recurrences: int
    grad_recurrences: int | None
    given_state: torch.Tensor | None
    past: Any  # int, or a tensor in a compiled call
    positions: torch.Tensor
    sequence_ids: torch.Tensor | None
    cache: Cache | None
    keep_states: bool
    read_all_depths: bool
    keep_hidden: bool
    read: torch.Tensor | None = None  # the state to read out, where nothing else shall run
    real: torch.Tensor | None = None  # [B, T], where a router: the tokens that are no padding
    capacity: Sequence[float] | None = None
    first_kv: dict[int, Any] = field(default_factory=dict)  # what the first recurrence wrote, where others read it
    routing: Routing | None = None
    state: torch.Tensor | None = None  # the one that is read out
    ponder: torch.Tensor | None = None
    layer_arguments: dict[int, tuple[tuple, dict]] = field(default_factory=dict)
    states: list[torch.Tensor] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)


def check_call(
    config: Any,
    num_recurrences: int,
    grad_recurrences: int | None,
    states: bool,
    depth_logits: bool,
    depth_loss: Callable | None,
    depth_loss_at: Sequence[int],
    cached: bool,
    others: Iterable[str],
) -> None:
    """Raise ValueError for options of a call that contradict the config or each other, and TypeError where one of
    `others`, names of arguments that go to the source, is an option misspelt."""
    for name, value in (("num_recurrences", num_recurrences), ("grad_recurrences", grad_recurrences)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r}: an integer, at least 1")
    for name in others:  # what is no option of ours goes to the source, which ignores what it does not know
        if near := difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.8):
            raise TypeError(f"forward() has no argument {name!r}: did you mean {near[0]!r}?")
    if config.sharing == "sequence" and (grad_recurrences or states or depth_logits):
        raise ValueError(
            "sharing='sequence' runs no recurrence of the whole core: it has no states or logits of each, and no "
            "grad_recurrences"
        )
    if cached and (depth_logits or depth_loss is not None):
        name = "output_depth_logits" if depth_logits else "depth_loss"
        raise ValueError(f"{name} reads the coda at every depth, which no cache holds: use_cache=False")
    if any(not 1 <= depth <= num_recurrences for depth in depth_loss_at):
        raise ValueError(f"depth_loss_at={list(depth_loss_at)}: depths are 1 to num_recurrences={num_recurrences}")
    if config.sharing == "sequence" and any(depth != num_recurrences for depth in depth_loss_at):
        raise ValueError("sharing='sequence' has no depth but the last to read out")


def logical_positions(tokens, attention_mask, position_ids, past: Any) -> torch.Tensor:
    """Positions [B or 1, T] of this call's tokens within their sequences, left padding not counted."""
    length = tokens.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if position_ids is not None:
        return position_ids
    return (torch.arange(length, device=tokens.device) + past)[None]


def real_tokens(tokens, attention_mask) -> torch.Tensor:
    """Which of this call's tokens [B, T] are no padding."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask[:, -tokens.shape[1] :].bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def with_given(s: torch.Tensor, call: Call) -> torch.Tensor:
    """s [B, T, D] with the rows that the caller's initial state covers replaced."""
    if call.given_state is None or call.given_state.shape[1] <= call.past:
        return s
    given = call.given_state[:, call.past : call.past + s.shape[1]].to(s)
    return torch.cat([given, s[:, given.shape[1] :]], dim=1)
