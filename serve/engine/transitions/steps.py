"""The steps of a pass and a read-out: choose, enter, settle, fetch, emit, start.

They are functions of whole tensors that look at no value on the host, so each can be compiled (see compile.py).
Shapes: n lanes of a pass, m lanes that are read out or start, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..exits import NUMBER
from ..request import NEVER
from ..state import State
from .drafts import of_waves, passed


def choose(state: State) -> tuple[Tensor, Tensor]:
    """Choose the decode lanes of the next pass.

    Returns the running decode lanes [num_decode_lanes + 1], at the front, and [3] how many lanes wait to be read out,
    run, and wait in waves of several positions. Where a pass has no room for all, rows take turns, and its lanes are
    the first of these. With several lanes of a row in flight, the caller chooses among them. Writes `turn`.
    """
    lanes, live = state.lanes, state.requests.live
    waits, runs = (state.live_flags(flag) for flag in (lanes.waiting, lanes.running))
    number = torch.arange(state.num_decode_lanes, device=live.device)
    count, place = runs.sum(), runs.cumsum(0) - 1
    turns = state.config.max_lanes and not state.policy.complete
    if turns:
        place = place - (runs & (number < state.turn[0] * state.ring)).sum()
        place = torch.where(place < 0, place + count, place)
    order = torch.zeros(state.num_decode_lanes + 1, dtype=torch.long, device=live.device)
    order = order.index_put((torch.where(runs, place, state.num_decode_lanes),), number)
    if turns and state.config.max_lanes < state.num_decode_lanes:
        following = order[state.config.max_lanes - 1] // state.ring + 1
        state.turn[1].copy_(torch.where(count > state.config.max_lanes, following, state.turn[0]))
    drafts = of_waves(state, waits).sum() if state.config.max_in_flight > 1 else count * 0
    return order, torch.stack([waits.sum() - drafts, count, drafts])


def enter(state: State, which: Tensor) -> tuple[Tensor, ...]:
    """Lanes `which` [n] enter a pass.

    Returns row, position and depth of each [n]; the lane has recurred before [n]; its request's num_recurrences [n]; it
    is among those that leave first [n]; its state [n, D]; and [3]: after how many passes the first lane leaves or
    stops, how many of those leave KV slots empty, and how many positions the farthest attends to. Writes `turn`.
    """
    lanes = state.lanes
    row, position, depth = lanes.row[which], lanes.position[which], lanes.depth[which]
    limit, left = state.requests.num_recurrences[row], lanes.exit_at[which] - depth
    until = left.min()
    if state.policy.complete:  # lanes that have left run to their limit
        exited = lanes.exited[which]
        until = torch.where(exited, limit - depth, left).min()
        left = torch.where(exited, NEVER, left)
    until = until.clamp(min=1)  # a pass runs, however few recurrences are left
    first = left <= until
    early = first & (depth + until < limit)
    state.turn[0].copy_(state.turn[1])
    counts = torch.stack([until, early.sum(), position.max() + 1])
    return row, position, depth, depth > 0, limit, first, lanes.s[which], counts


def settle(
    state: State, which: Tensor, row: Tensor, position: Tensor, depth: Tensor, after: Tensor, leaves: Tensor
) -> tuple[Tensor, ...]:
    """Lanes `which` [n] have recurred, last at `depth` [n], to the states `after` [n, D]; those in `leaves` [n] exit.

    Returns [5]: exits, KV slots left empty, and the counts of `choose`; the slots [n] that each lane leaves empty; and
    the order of `choose`.
    """
    lanes, requests, policy = state.lanes, state.requests, state.policy
    decodes, done, limit = which < state.num_decode_lanes, depth + 1, requests.num_recurrences[row]
    # With a complete policy, only lanes of a diffusion have an exit_at beyond the limit.
    runs = (done < limit) | (lanes.exit_at[which] > limit) if policy.complete else ~leaves
    passes = decodes * (done - lanes.depth[which])
    waits = leaves | passed(state, which, row, done)
    lanes.s.index_put_((which,), after)
    if policy.complete:  # the lane runs on, and its state changes
        lanes.readout_state.index_put_((which,), torch.where(leaves[:, None], after, lanes.readout_state[which]))
    lanes.depth.index_put_((which,), done)
    lanes.exit_depth.index_put_((which,), torch.where(leaves, done, lanes.exit_depth[which]))
    lanes.running.index_put_((which,), runs)
    lanes.waiting.index_put_((which,), waits | lanes.waiting[which])
    lanes.exited.index_put_((which,), leaves | lanes.exited[which])
    silent = leaves & ~lanes.wants_token[which]
    depths = torch.where(silent, done.int(), requests.forced_depths[row, position])
    requests.forced_depths.index_put_((row, position), depths)
    rows = torch.arange(len(requests.lane_passes), device=row.device)
    of = row[:, None] == rows
    passes_of = torch.where(of, passes[:, None], 0)
    in_row = passes_of.amax(0)
    requests.lane_passes.add_(passes_of.sum(0))
    requests.passes.add_(in_row)
    requests.phase.add_(in_row * requests.refines)
    requests.saw_nonfinite.logical_or_((of & ~after.isfinite().all(1)[:, None]).any(0))
    empty = torch.where(leaves, policy.empty(done, limit), 0) if policy.fills else torch.zeros_like(done)
    order, counts = choose(state)
    return torch.cat([torch.stack([leaves.sum(), empty.sum()]), counts]), empty, order


def fetch(state: State, which: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lanes `which` [m] are read out, and wait no longer. Returns their states [m, D], rows and positions [m]."""
    lanes = state.lanes
    lanes.waiting.index_put_((which,), torch.zeros_like(which, dtype=torch.bool))
    s = lanes.s[which]
    if state.policy.complete:
        s = torch.where(lanes.exited[which][:, None], lanes.readout_state[which], s)
    return s, lanes.row[which], lanes.position[which]


def emit(state: State, which: Tensor, row: Tensor, position: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Put out `tokens` [m] of lanes `which` [m], in rows at positions [m], one a row at most.

    A token known beforehand is neither put out nor counted. Returns the tokens' positions [m], and whether each request
    has stopped [m].
    """
    lanes, requests = state.lanes, state.requests
    exit_depth = lanes.exit_depth[which]
    lanes.uncommitted.index_put_((which,), torch.zeros_like(which, dtype=torch.bool))
    requests.forced_depths.index_put_((row, position), exit_depth.int())
    position = position + 1
    known = (requests.known_tokens[row, position] > 0).long()
    count = requests.count[row]
    requests.tokens.index_put_((row, count), tokens)
    requests.depths.index_put_((row, count), exit_depth)
    remaining = requests.remaining[row] - 1 + known
    stopped = (requests.stops[row] == tokens[:, None]).any(1) & (known == 0)
    stopped = stopped | (remaining <= 0) | (position >= state.config.max_model_len)
    requests.count.index_put_((row,), count + 1 - known)
    requests.remaining.index_put_((row,), torch.where(stopped, 0, remaining))
    requests.next_position.index_put_((row,), position)
    requests.live.index_put_((row,), requests.live[row] & ~stopped)
    return position, stopped


def start(
    state: State, where: Tensor, row: Tensor, position: Tensor, tokens: Tensor, may_exit: Tensor, e: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """Start tokens [m], with inputs e and states s [m, D], at depth 0 in lanes `where` [m].

    Lanes without `may_exit` [m] run to their request's limit, whatever its rule. Returns the result of `choose`.
    """
    requests = state.requests
    if state.keeps_input:
        state.lanes.e.index_put_((where,), e)
    state.lanes.s.index_put_((where,), s)
    forced = requests.forced_depths[row, position].long()
    may_exit = (requests.rule[row] != NUMBER["fixed"]) & (forced == 0) & may_exit
    exit_at = torch.where(forced > 0, forced, requests.num_recurrences[row])
    start_lanes(state, where, row, position, exit_at, may_exit.long(), tokens)
    return choose(state)


def start_lanes(
    state: State, where: Tensor, row: Tensor, position: Tensor, exit_at: Tensor, may_exit: Tensor, token: Tensor
) -> None:
    """Set the integers and flags of lanes `where` [m] that start."""
    lanes, zero = state.lanes, torch.zeros_like(where)
    for target, values in (
        (lanes.row, row),
        (lanes.position, position),
        (lanes.depth, zero),
        (lanes.exit_at, exit_at),
        (lanes.may_exit, may_exit),
        (lanes.token, token),
        (lanes.draft_token, zero - 1),
    ):
        target.index_put_((where,), values)
    for flag in (lanes.running, lanes.wants_token, lanes.uncommitted):
        flag.index_put_((where,), zero == 0)
    for flag in (lanes.waiting, lanes.exited):
        flag.index_put_((where,), zero > 0)


class Steps(NamedTuple):
    """The functions above, as they are or compiled."""

    choose: Callable[..., tuple[Tensor, Tensor]]
    enter: Callable[..., tuple[Tensor, ...]]
    settle: Callable[..., tuple[Tensor, ...]]
    fetch: Callable[..., tuple[Tensor, Tensor, Tensor]]
    emit: Callable[..., tuple[Tensor, Tensor]]
    start: Callable[..., tuple[Tensor, Tensor]]


STEPS = Steps(choose, enter, settle, fetch, emit, start)
