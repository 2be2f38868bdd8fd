"""One forward call: its options, checked, and what the recurrence needs of it and leaves behind.

Shapes: B batch, T tokens of this call, D width, R recurrences.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.cache_utils import Cache

from .configuration_recurrent_depth import RecurrentDepthConfig
from .router import Routing

DepthLoss = Callable[[int, torch.Tensor], torch.Tensor]  # depth, logits [B, T, V] -> loss


@dataclass
class Options:
    """The arguments of a forward call beyond transformers', see RecurrentDepthForCausalLM."""

    num_recurrences: int
    grad_recurrences: int | None
    initial_state: torch.Tensor | None
    sequence_ids: torch.Tensor | None
    output_states: bool
    output_depth_logits: bool
    depth_loss: DepthLoss | None
    depth_loss_at: Sequence[int]
    detach_after: Sequence[int]
    rows: torch.Tensor | None  # R of each row [B], where they differ; num_recurrences is the greatest
    router_capacity: Sequence[float] | None

    @property
    def reads_depths(self) -> bool:
        """True where the coda reads out more than the last state."""
        return self.output_depth_logits or self.depth_loss is not None

    @property
    def keep_states(self) -> bool:
        """True where all states are needed after the recurrence."""
        return self.output_states or self.depth_loss is not None


class Place(NamedTuple):
    """One run of a layer, with the arguments of `source_layer`, on a key-value slot of its own."""

    layer: nn.Module
    source_layer: int
    slot: int
    depth: int | None = None  # for a core layer, counted from 0


@dataclass
class Call:
    """One forward call as the recurrence sees it: options, inputs, then results.

    past: number of cached positions; a tensor in a compiled call with a static cache.
    positions: [B or 1, T], within the sequences, left padding not counted.
    capacity: shares of the sequence that an expert-choice router takes; None where thresholds decide.
    state_to_read: a state [B, T, D] to be read out; nothing else runs then.
    not_padding: [B, T] bool, for a model with a router.
    logits_at: [B, T] bool, the positions whose logits are computed; None: those of `logits_to_keep`.
    """

    options: Options
    past: int | torch.Tensor
    positions: torch.Tensor
    cache: Cache | None
    keep_hidden: bool
    keep_router_logits: bool
    capacity: Sequence[float] | None = None
    state_to_read: torch.Tensor | None = None
    not_padding: torch.Tensor | None = None
    logits_at: torch.Tensor | None = None
    # Results, and what layers share, written while the call runs:
    layer_arguments: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)  # by source layer
    first_kv: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)  # first recurrence's, by slot
    routing: Routing | None = None
    states: list[torch.Tensor] = field(default_factory=list)  # s_1, s_2, .. or the last alone
    hidden: list[torch.Tensor] = field(default_factory=list)  # inputs of all layers, then the normed end
    state: torch.Tensor | None = None  # [B, T, D], read out last
    ponder: torch.Tensor | None = None  # [B, T], the cost of halting


def check_call(config: RecurrentDepthConfig, options: Options, cached: bool, others: Iterable[str]) -> None:
    """Raise ValueError for options of a call that contradict the config or each other.

    cached: True for a call with a key-value cache. others: names of arguments that the source's forward gets. Raises
    TypeError for one that is a misspelt option: the source ignores unknown arguments.
    """
    recurrences, at = options.num_recurrences, options.depth_loss_at
    counts: dict[str, Any] = {"num_recurrences": recurrences, "grad_recurrences": options.grad_recurrences}
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r}: an integer, at least 1")
    for name in others:
        if near := difflib.get_close_matches(name, [option.name for option in fields(Options)], n=1, cutoff=0.8):
            raise TypeError(f"forward() has no argument {name!r}: did you mean {near[0]!r}?")
    depth_logits = options.output_depth_logits
    if config.sharing == "sequence" and (options.grad_recurrences or options.output_states or depth_logits):
        raise ValueError(
            "sharing='sequence' runs no recurrence of the whole core: it has no states or logits of each, and no "
            "grad_recurrences"
        )
    if cached and options.reads_depths:
        name = "output_depth_logits" if depth_logits else "depth_loss"
        raise ValueError(f"{name} reads the coda at every depth, which no cache holds: use_cache=False")
    if options.rows is not None and (cached or options.reads_depths or config.router or config.halting == "act"):
        raise ValueError(
            "num_recurrences [B] goes neither with a cache (use_cache=False), nor with depth_loss, "
            "output_depth_logits, a router or halting"
        )
    if options.rows is not None and config.sharing == "sequence":
        raise ValueError("num_recurrences [B]: sharing='sequence' runs no recurrence of the whole core")
    if options.rows is not None and options.grad_recurrences and config.kv_policy == "first":
        raise ValueError(
            "num_recurrences [B] with grad_recurrences: kv_policy='first' keeps the first recurrence's keys, which "
            "need gradient in some rows and none in others"
        )
    if any(not 1 <= depth <= recurrences for depth in at):
        raise ValueError(f"depth_loss_at={list(at)}: depths are 1 to num_recurrences={recurrences}")
    if any(not 1 <= depth < recurrences for depth in options.detach_after):
        raise ValueError(
            f"detach_after={list(options.detach_after)}: recurrences are 1 to num_recurrences={recurrences}, and none "
            "follows the last"
        )
    if options.detach_after and config.sharing == "sequence":
        raise ValueError("detach_after: sharing='sequence' runs no recurrence of the whole core")
    if config.sharing == "sequence" and any(depth != recurrences for depth in at):
        raise ValueError("sharing='sequence' has no depth but the last to read out")


def recurrences_of(num_recurrences: Any, default: int, batch: int) -> tuple[int, torch.Tensor | None]:
    """(R of a call, R of each of its `batch` rows [B] if `num_recurrences` is a tensor, else None).

    default: R where `num_recurrences` is None. Raises ValueError for a wrong tensor.
    """
    if not isinstance(num_recurrences, torch.Tensor):
        return default if num_recurrences is None else num_recurrences, None
    rows = num_recurrences
    if rows.shape != (batch,) or rows.is_floating_point() or rows.dtype == torch.bool or int(rows.min()) < 1:
        raise ValueError(f"num_recurrences={rows.tolist()}: an integer, at least 1, for each of {batch} rows")
    return int(rows.max()), rows


def logical_positions(
    tokens: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    past: int | torch.Tensor,
) -> torch.Tensor:
    """Positions [B or 1, T] of tokens [B, T] (or embeddings [B, T, D]) in their sequences, left padding not counted."""
    length = tokens.shape[1]
    if attention_mask is not None and attention_mask.dim() == 2:
        return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    if position_ids is not None:
        return position_ids
    return (torch.arange(length, device=tokens.device) + past)[None]


def not_padding(tokens: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """True [B, T] for the tokens [B, T] (or embeddings [B, T, D]) of this call that are no padding."""
    if attention_mask is not None and attention_mask.dim() == 2:
        return attention_mask[:, -tokens.shape[1] :].bool()
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def with_initial_state(s: torch.Tensor, call: Call) -> torch.Tensor:
    """s_0 [B, T, D] with the positions replaced that the caller's initial state covers."""
    given = call.options.initial_state
    if given is None or given.shape[1] <= call.past:
        return s
    given = given[:, call.past : call.past + s.shape[1]].to(s)
    return torch.cat([given, s[:, given.shape[1] :]], dim=1)
