"""The steps of a graph tick: those of transitions/ in a fixed width, which the device takes without the host.

A row of a pass or a read-out is real, or stands for the spare lane. No shape depends on a value.
Shapes: N rows of a pass or a read-out, M rows of a State, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import transitions
from .decoders import wave
from .graphs import padded
from .request import NEVER
from .state import State


class Note(NamedTuple):
    """The result of a pass, as the host learns it.

    ran: its lanes.   exits: lanes that left.   waits, runs, drafts: decode lanes that then wait to be read out, run,
    and wait in waves.
    soonest, latest: passes after which the first of these leaves at the soonest, and the last at the latest.
    leaving: lanes of the next pass that leave in it, whatever their rules decide.   live: requests that are live.
    read: lanes of the read-out before the pass, or of the one that came last.
    """

    ran: int
    exits: int
    waits: int
    runs: int
    drafts: int
    soonest: int
    latest: int
    leaving: int
    live: int
    read: int


@dataclass(eq=False)
class GraphState:
    """A State with the tensors by which passes follow each other without the host. Written by the steps below.

    every [N]: 0, 1, ...   order [N + 1]: running lanes, at the front.   runs: their number.   real: false while a graph
    is recorded, when no row is real.   read: lanes of the newest read-out, until a pass has noted them.   note [10]:
    the newest `Note`.
    """

    state: State
    every: Tensor
    order: Tensor
    runs: Tensor
    real: Tensor
    read: Tensor
    note: Tensor

    @classmethod
    def create(cls, state: State) -> GraphState:
        """Room for all decode lanes."""
        room, device = padded(state.num_decode_lanes), state.device
        zeros = torch.zeros(room + 1 + len(Note._fields), dtype=torch.long, device=device)
        return cls(
            state=state,
            every=torch.arange(room, device=device),
            order=zeros[: room + 1].clone(),
            runs=zeros[0].clone(),
            real=torch.ones((), dtype=torch.bool, device=device),
            read=zeros[0].clone(),
            note=zeros[room + 1 :].clone(),
        )


def _keep(graph: GraphState, order: Tensor, *counts: Tensor) -> Tensor:
    """Set the `order` in which lanes run, and the note, whose first five numbers are `counts`. Returns the note."""
    state, runs = graph.state, counts[3]
    graph.order[: len(order)].copy_(order)
    graph.runs.copy_(runs)
    lanes, number = state.lanes, torch.arange(len(order), device=order.device)
    running, left = number < runs, lanes.exit_at[order] - lanes.depth[order]
    running = running & ~lanes.exited[order] if state.policy.complete else running
    soon = torch.where(lanes.may_exit[order] > 0, 1, left)
    if state.config.max_in_flight > 1:  # exits of waves wait for drafts, if they are sure
        waves = state.requests.max_in_flight[lanes.row[order]] > 1
        soon = torch.where(waves & ~transitions.drafts.unsure(state, lanes.exit_at)[order], NEVER, soon)
    next = running & (number < state.config.max_lanes) if state.config.max_lanes else running
    ahead = (
        torch.where(running, soon, NEVER).min(),
        torch.where(running, left, 0).max(),
        (next & (left <= 1)).sum(),
        state.requests.live.sum(),
        graph.read,
    )
    note = torch.stack([*counts, *ahead])
    graph.note.copy_(note)
    return note


def _choose(graph: GraphState) -> Tensor:
    """As transitions.choose, where no read-out is to be noted. Returns the note."""
    graph.read.zero_()
    return _chosen(graph, *transitions.steps.choose(graph.state))


def _chosen(graph: GraphState, order: Tensor, counts: Tensor) -> Tensor:
    zero = torch.zeros_like(graph.runs)
    return _keep(graph, order, zero, zero, *counts)


def _enter(graph: GraphState, every: Tensor) -> tuple[Tensor, ...]:
    """Lanes of a pass of `every` [N] rows.

    Returns, for each [N]: lane; it is real; row; position; depth; it has recurred; its request's num_recurrences; KV
    slot; it writes there; it leaves, if no rule ends it before; state and input [N, D].
    """
    state, policy = graph.state, graph.state.policy
    runs = graph.runs.clamp(max=state.config.max_lanes) if state.config.max_lanes else graph.runs
    real = (every < runs) & graph.real
    which = torch.where(real, graph.order[every], state.spare)
    row, position, depth, _, limit, _, s, _ = transitions.steps.enter(state, which)
    depth = torch.where(real, depth, 0)
    writes = policy.writes(depth)
    write = real if writes is None else real & writes
    leaves = real & (state.lanes.exit_at[which] - depth <= 1)
    leaves = leaves & ~state.lanes.exited[which] if policy.complete else leaves
    e = state.lanes.e[which] if state.keeps_input else s
    return which, real, row, position, depth, depth > 0, limit, policy.slot(depth), write, leaves, s, e


def _settle(
    graph: GraphState,
    which: Tensor,
    real: Tensor,
    row: Tensor,
    position: Tensor,
    depth: Tensor,
    leaves: Tensor,
    after: Tensor,
) -> Tensor:
    """Lanes [N] have recurred to the states `after` [N, D], and some leave. Returns the slots [N] they leave empty."""
    after = torch.where(real[:, None], after, 0)
    counts, empty, order = transitions.steps.settle(graph.state, which, row, position, depth, after, leaves)
    exits, _, *rest = counts
    _keep(graph, order, real.sum(), exits, *rest)
    graph.read.zero_()
    return empty


def _fetch(graph: GraphState, every: Tensor) -> tuple[Tensor, ...]:
    """Lanes of a read-out of `every` [N] rows. Returns, for each: lane; it is real; row; position; state [N, D]."""
    state = graph.state
    decodes = torch.arange(state.num_decode_lanes, device=every.device)
    due = transitions.drafts.due(state)
    place = torch.where(due, due.cumsum(0) - 1, len(graph.every))
    order = torch.zeros_like(graph.order).index_put((place,), decodes)
    real = (every < due.sum()) & graph.real
    graph.read.copy_(real.sum())
    which = torch.where(real, order[every], state.spare)
    s, row, position = transitions.steps.fetch(state, which)
    return which, real, row, torch.where(real, position, 0), s


def with_known(state: State, row: Tensor, position: Tensor, tokens: Tensor) -> Tensor:
    """Tokens [n] after positions [n] of rows [n]: those known beforehand where there are some, else `tokens` [n]."""
    known = state.requests.known_tokens[row, position + 1].long()
    return torch.where(known > 0, known - 1, tokens)


def _emit(
    graph: GraphState, which: Tensor, real: Tensor, row: Tensor, position: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    """Put out `tokens` [N], or the tokens known beforehand. Returns, for each: the lane in which it starts; it does
    start; its row; its position; the token."""
    state = graph.state
    tokens = with_known(state, row, position, tokens)
    position, stopped = transitions.steps.emit(state, which, row, position, tokens)
    transitions.padding.clear_spare_count(state)
    there = real & ~stopped
    where = torch.where(there, state.lane_of(row, position), state.spare)
    row, position = torch.where(there, row, state.config.max_num_seqs), torch.where(there, position, 0)
    return where, there, row, position, tokens


def _advance(
    graph: GraphState, which: Tensor, row: Tensor, position: Tensor, tokens: Tensor, every: Tensor
) -> tuple[Tensor, ...]:
    """As `_emit`, with waves among the requests: of lanes [N], for `every` [M] row that is live.

    A plain request is a wave of one position. Returns what starts, as `_emit` does, for each [M].
    """
    state = graph.state
    transitions.windows.set_drafts(state, which, with_known(state, row, position, tokens))
    live, spare = state.requests.live[:-1], state.config.max_num_seqs
    place = torch.where(live, live.cumsum(0) - 1, len(graph.every))
    rows = torch.full_like(graph.order, spare).index_put((place,), torch.arange(spare, device=live.device))
    rows = torch.where((every < live.sum()) & graph.real, rows[every], spare)
    return wave.advance(state, rows)[:5]


def _start(graph: GraphState, *of: Tensor) -> Tensor:
    """As transitions.start. Returns the note."""
    return _chosen(graph, *transitions.steps.start(graph.state, *of))


class GraphSteps(NamedTuple):
    """The functions above, as they are or compiled."""

    choose: Callable[..., Tensor]
    enter: Callable[..., tuple[Tensor, ...]]
    settle: Callable[..., Tensor]
    fetch: Callable[..., tuple[Tensor, ...]]
    emit: Callable[..., tuple[Tensor, ...]]
    advance: Callable[..., tuple[Tensor, ...]]
    start: Callable[..., Tensor]


STEPS = GraphSteps(_choose, _enter, _settle, _fetch, _emit, _advance, _start)


def keep_order(graph: GraphState, width: int) -> None:
    """Order the running lanes for a pass of `width` rows that has no room for all."""
    count = graph.state.num_decode_lanes
    graph.order[:count].copy_(transitions.turns.ordered(graph.state, graph.order[:count], graph.runs, width))
