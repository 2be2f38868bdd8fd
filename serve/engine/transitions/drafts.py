"""The positions of waves: how many may be in flight, and which wait for a read-out.

Shapes: R rows, n lanes of a pass, L decode lanes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..request import Request
from ..state import State


def table(request: Request, most: int) -> Tensor:
    """`RequestState.drafts` [most] of a request: how many depths up to each it drafts at. Plain decoding has none."""
    depth = torch.arange(most)
    every = depth % max(request.draft_every, 1) == 0
    at = torch.isin(depth, torch.tensor(request.draft_depths)) if request.draft_depths else every
    return (at & (depth > 0) & (request.max_in_flight > 1)).cumsum(0)


def in_flight(state: State) -> Tensor:
    """Positions [R] of each row whose tokens are not out."""
    lanes = state.lanes.uncommitted[: state.num_decode_lanes].view(-1, state.ring).sum(1)
    return torch.nn.functional.pad(lanes, (0, 1))


def allowed_widths(state: State) -> Tensor:
    """Positions [R] that each row's wave may have in flight now, in passes of `max_lanes` or else `budget` lanes.

    Certain positions come first, and a diffusion keeps its window; waves share the rest.
    """
    requests, live = state.requests, state.requests.live
    budget = state.budget * 0 + state.config.max_lanes if state.config.max_lanes else state.budget
    taken = torch.where(requests.refines & live, in_flight(state) - 1, 0).clamp(min=0).sum()
    waves = (live & (requests.max_in_flight > 1)).sum()
    share = 1 + (budget - live.sum() - taken).clamp(min=0) // waves.clamp(min=1)
    return torch.where(budget > 0, torch.minimum(requests.max_in_flight, share), requests.max_in_flight)


def beyond_widths(state: State) -> Tensor:
    """Positions [] in flight beyond what their rows' waves may have now. They started when fewer requests were live.

    The widths of live rows are one lane for each, and more up to the budget. A row's width shrinks when requests come,
    between steps. So in a step no more positions are in flight than these lanes and those beyond.
    """
    return (in_flight(state) - allowed_widths(state)).clamp(min=0).sum()


def passed(state: State, which: Tensor, row: Tensor, done: Tensor) -> Tensor:
    """[n]: decode lanes `which` [n] of waves, in rows [n], come to a draft with their recurrences up to `done` [n].

    A wave of one position, which may have no other, is read out at its exit alone.
    """
    if state.config.max_in_flight == 1:
        return torch.zeros_like(done, dtype=torch.bool)
    lanes, drafts = state.lanes, state.requests.drafts
    before, now = (drafts[row, depth.clamp(max=drafts.shape[1] - 1)] for depth in (lanes.depth[which], done))
    wide = (in_flight(state) > 1) | (allowed_widths(state) > 1)
    return (which < state.num_decode_lanes) & (now > before) & ~lanes.exited[which] & wide[row]


def unsure(state: State, exits: Tensor) -> Tensor:
    """[L]: lanes of a row's first position whose draft has not stayed the same over a read-out before it leaves, after
    `exits` [L] recurrences."""
    requests, ring = state.requests, state.ring
    rows = torch.arange(state.config.max_num_seqs, device=exits.device)[:, None]
    at, last = (part[: state.num_decode_lanes].view(-1, ring) for part in (state.lanes.draft_depth, exits - 1))
    stays, ends = (requests.drafts[rows, depth.clamp(0, requests.drafts.shape[1] - 1)] for depth in (at, last))
    first = state.lanes.position[: state.num_decode_lanes].view(-1, ring) == requests.next_position[:-1, None]
    return (first & (stays >= ends)).view(-1)


def of_waves(state: State, flags: Tensor) -> Tensor:
    """[L]: `flags` [L] of waves alone, but for exits that should wait for no other read-out.

    These are exits without other positions beside them, and those that are `unsure`: the draft may be wrong, and then
    all behind it waste their passes.
    """
    lanes, ring = state.lanes, state.ring
    waves, several = state.requests.max_in_flight[:-1, None] > 1, in_flight(state)[:-1, None] > 1
    sure = ~unsure(state, lanes.exit_depth).view(-1, ring)
    drafts = ~lanes.exited[: state.num_decode_lanes].view(-1, ring)
    return (flags.view(-1, ring) & waves & (drafts | (several & sure))).view(-1)


def due(state: State) -> Tensor:
    """[L]: lanes of live rows that a read-out takes.

    All that wait; and beside these, the lanes of a wave that have left, whose tokens are not out: through a coda, a
    draft depends on the read-outs to its left.
    """
    waits = state.live_flags(state.lanes.waiting)
    if state.config.max_in_flight == 1:
        return waits
    row = waits.view(-1, state.ring).any(1, keepdim=True).expand(-1, state.ring).reshape(-1)
    count = state.num_decode_lanes
    return waits | of_waves(state, row & state.lanes.exited[:count] & state.lanes.uncommitted[:count])
