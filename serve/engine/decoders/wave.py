"""The exact wave: positions of one request in flight at staggered depths, whose tokens are those of plain decoding.

Every lane is read out after every recurrence. The next position starts from the draft token of that read-out, one pass
behind. So it finds the KV entries of every depth that it needs. When a later read-out changes the draft, all
positions to its right are dropped and start anew. A token is put out once its lane has exited and all tokens before it
are out: then the lane started from the right token, and attended to the right KV entries.
Shapes: R rows, m rows with a wave, W the greatest width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..state import State
from ..transitions import windows


class Advance(NamedTuple):
    """The waves of `rows` after a read-out. lanes [m, W]: their lanes from the left.   certain [m, W]: lanes whose
    drafts are put out, in this order.   ends [m]: the rightmost lane that stands on the right tokens."""

    rows: Tensor
    lanes: Tensor
    certain: Tensor
    ends: Tensor


def speculative(state: State, allowed: Tensor) -> Tensor:
    """Lanes [n] of live waves that have recurred and whose tokens are not out. `allowed` [R]: see `allowed_widths`."""
    lanes, requests, count = state.lanes, state.requests, state.num_decode_lanes
    row = lanes.row[:count]
    uncommitted = requests.live[row] & (requests.max_in_flight[row] > 1) & lanes.uncommitted[:count]
    which = (uncommitted & (lanes.depth[:count] > 0)).nonzero().squeeze(1)
    if not len(which):
        return which
    row, alone = row[which], torch.bincount(row[uncommitted], minlength=len(requests.live)) == 1
    return which[lanes.exited[which] | ~alone[row] | (allowed[row] > 1)]


def advance(state: State, rows: Tensor) -> Advance:
    """After a read-out of the waves of `rows` [m]: drop the lanes that stand on a changed token, and find the certain
    ones."""
    lanes, widths = state.lanes, state.requests.max_in_flight[rows]
    offsets = torch.arange(int(widths.max()), device=rows.device)
    position = state.requests.next_position[rows][:, None] + offsets
    lane = state.lane_of(rows[:, None], position)  # [m, W]
    there = lanes.uncommitted[lane] & (lanes.position[lane] == position) & (offsets < widths[:, None])
    draft, token = lanes.draft_token[lane], lanes.token[lane]
    right = there.clone()
    right[:, 1:] &= token[:, 1:] == draft[:, :-1]
    right = right.long().cumprod(1).bool()
    windows.drop(state, lane[there & ~right])
    certain = (right & lanes.exited[lane]).long().cumprod(1).bool()
    last = right.sum(1) - 1
    return Advance(rows, lane, certain, lane.gather(1, last[:, None]).squeeze(1))


def starts(state: State, done: Advance, going: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, positions and tokens [k] that start, one position more for each wave, once its certain tokens are out.

    going [m]: the request has not stopped.   allowed [R]: see `allowed_widths`.
    """
    lanes, requests, rows = state.lanes, state.requests, done.rows
    position, draft = lanes.position[done.ends] + 1, lanes.draft_token[done.ends]
    wide = position - requests.next_position[rows] < allowed[rows]
    which = going & wide & (draft >= 0) & (position < state.config.max_model_len)
    return rows[which], position[which], draft[which]


def allowed_widths(state: State, budget: int, taken: int) -> Tensor:
    """Positions [R] that each row's wave may have in flight now, in passes of `budget` lanes (0: no bound).

    Certain positions come first, and `taken` lanes belong to others; waves share the rest.
    """
    requests, budget = state.requests, state.config.max_lanes or budget
    if not budget:
        return requests.max_in_flight
    waves = requests.live & (requests.max_in_flight > 1)
    left = budget - int(requests.live.sum()) - taken
    return requests.max_in_flight.clamp(max=1 + max(0, left) // max(int(waves.sum()), 1))


def lane_budget(state: State, decodes: Tensor, budget: int) -> int:
    """Lanes of a pass, of decode lanes [n]: all certain ones, and others up to `budget`."""
    lanes, requests = state.lanes, state.requests
    row = lanes.row[decodes]
    certain = (lanes.position[decodes] <= requests.next_position[row]) | requests.refines[row]
    return max(budget, int(certain.sum()))
