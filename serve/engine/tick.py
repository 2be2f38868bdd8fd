"""What a tick does to the state of lanes and requests: functions of whole tensors, without a host's look at any value,
each of which can be compiled (see compiled.py).

Shapes: n lanes of a pass, m lanes that are read out or start, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from .diffusion import NEVER
from .exits import NUMBER

if TYPE_CHECKING:
    from .loop import Loop


def choose(loop: Loop) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows' own lanes that run on [rows ring + 1], at the front; and how many of all wait to be read out, and run
    on [2]. Where a pass has not room for all, rows take turns, and its lanes are the first of them: `loop.turn` [2] has
    the first row of this pass, and of the one after it. With several lanes of a row, the caller chooses."""
    lanes, live = loop.lanes, loop.requests.live
    waits, runs = (lanes.own_of_live(flag, live) for flag in (lanes.waiting, lanes.running))
    number, count, place = torch.arange(lanes.own, device=live.device), runs.sum(), runs.cumsum(0) - 1
    turns = loop.width and not loop.policy.complete
    if turns:
        place = place - (runs & (number < loop.turn[0] * lanes.ring)).sum()
        place = torch.where(place < 0, place + count, place)
    order = torch.zeros(lanes.own + 1, dtype=torch.long, device=live.device)
    order = order.index_put((torch.where(runs, place, lanes.own),), number)
    if turns and loop.width < lanes.own:
        loop.turn[1].copy_(torch.where(count > loop.width, order[loop.width - 1] // lanes.ring + 1, loop.turn[0]))
    return order, torch.stack([waits.sum(), count])


def enter(loop: Loop, which: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Lanes `which` [n] go on. Returns row, position and depth of each, whether it has begun, whether it is among those
    that leave first [n], and its state [n, D]; after how many passes the first one leaves or stops, how many leave KV
    slots empty there, and how many positions the farthest one sees [3]."""
    lanes = loop.lanes
    row, position, depth = lanes.row[which], lanes.position[which], lanes.depth[which]
    limit, left = loop.requests.limit[row], lanes.target[which] - depth
    until = left.min()
    if loop.policy.complete:  # those that have left run to their limit
        exited = lanes.exited[which]
        until = torch.where(exited, limit - depth, left).min()
        left = torch.where(exited, NEVER, left)
    until = until.clamp(min=1)  # a pass runs whatever is left
    first = left <= until
    early = first & (depth + until < limit)
    loop.turn[0].copy_(loop.turn[1])
    return row, position, depth, depth > 0, first, lanes.s[which], torch.stack([until, early.sum(), position.max() + 1])


def settle(
    loop: Loop,
    which: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    depth: torch.Tensor,
    after: torch.Tensor,
    leaves: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Passes have brought lanes `which` [n], of which the last was at `depth` [n], to `after` [n, D], and some leave.
    Returns how many do, how many KV slots are left empty, and how many lanes then wait, and run on, as `choose` does
    [4]; how many slots [n] are left empty by each; and what `choose` has chosen then."""
    lanes, requests, policy = loop.lanes, loop.requests, loop.policy
    own, done, limit = which < lanes.own, depth + 1, requests.limit[row]
    # Of the lanes with a complete policy, only those of a diffusion have a target beyond the limit.
    runs = (done < limit) | (lanes.target[which] > limit) if policy.complete else ~leaves
    passes = own * (done - lanes.depth[which])
    waits = leaves & ((requests.wave[row] == 1) | ~own)  # a wave is read out after every pass
    lanes.s.index_put_((which,), after)
    if policy.complete:  # runs on, and changes its state
        lanes.read.index_put_((which,), torch.where(leaves[:, None], after, lanes.read[which]))
    lanes.depth.index_put_((which,), done)
    lanes.left.index_put_((which,), torch.where(leaves, done, lanes.left[which]))
    lanes.running.index_put_((which,), runs)
    lanes.waiting.index_put_((which,), waits | lanes.waiting[which])
    lanes.exited.index_put_((which,), leaves | lanes.exited[which])
    silent = leaves & ~lanes.emits[which]
    requests.trace.index_put_((row, position), torch.where(silent, done.int(), requests.trace[row, position]))
    rows = torch.arange(len(requests.items), device=row.device)
    of = row[:, None] == rows
    passes_of = torch.where(of, passes[:, None], 0)
    ticks = passes_of.amax(0)
    requests.items += passes_of.sum(0)
    requests.ticks += ticks
    requests.phase += ticks * requests.refines
    requests.wild |= (of & ~after.isfinite().all(1)[:, None]).any(0)
    empty = torch.where(leaves, policy.empty(done, limit), 0) if policy.fills else torch.zeros_like(done)
    order, counts = choose(loop)
    return torch.cat([torch.stack([leaves.sum(), empty.sum()]), counts]), empty, order


def fetch(loop: Loop, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lanes `which` [m] are read out, and wait no longer. Returns the states [m, D], rows and positions [m] of it."""
    lanes = loop.lanes
    lanes.waiting.index_put_((which,), torch.zeros_like(which, dtype=torch.bool))
    s = lanes.s[which]
    if loop.policy.complete:
        s = torch.where(lanes.exited[which][:, None], lanes.read[which], s)
    return s, lanes.row[which], lanes.position[which]


def emit(
    loop: Loop, which: torch.Tensor, row: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put out `tokens` [m] that lanes `which` [m], of rows at positions [m], have given, one a row at most. Returns the
    tokens' positions, and whether the request has stopped [m]."""
    lanes, requests = loop.lanes, loop.requests
    left = lanes.left[which]
    lanes.open.index_put_((which,), torch.zeros_like(which, dtype=torch.bool))
    requests.trace.index_put_((row, position), left.int())
    position = position + 1
    known = (requests.script[row, position] > 0).long()  # is neither put out nor counted
    count = requests.count[row]
    requests.tokens.index_put_((row, count), tokens)
    requests.depths.index_put_((row, count), left)
    remaining = requests.remaining[row] - 1 + known
    stopped = (requests.stops[row] == tokens[:, None]).any(1) & (known == 0)
    stopped = stopped | (remaining <= 0) | (position >= requests.length)
    requests.count.index_put_((row,), count + 1 - known)
    requests.remaining.index_put_((row,), torch.where(stopped, 0, remaining))
    requests.frontier.index_put_((row,), position)
    requests.live.index_put_((row,), requests.live[row] & ~stopped)
    return position, stopped


def begin(
    loop: Loop,
    where: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    may_exit: torch.Tensor,
    e: torch.Tensor,
    s: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start tokens [m], with inputs e and states s [m, D], at depth 0 in lanes `where` [m]. Those that may not exit
    ([m]) run to their request's limit, whatever its rule. Returns what `choose` does then."""
    lanes, requests = loop.lanes, loop.requests
    if loop.keeps_input:
        lanes.e.index_put_((where,), e)
    lanes.s.index_put_((where,), s)
    forced = requests.trace[row, position].long()
    free = (requests.rule[row] != NUMBER["fixed"]) & (forced == 0) & may_exit
    target = torch.where(forced > 0, forced, requests.limit[row])
    lanes.begin(where, row, position, target, free.long(), tokens)
    return choose(loop)


class Steps(NamedTuple):
    """The functions above, as they are or compiled."""

    choose: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    enter: Callable
    settle: Callable
    fetch: Callable
    emit: Callable
    begin: Callable


STEPS = Steps(choose, enter, settle, fetch, emit, begin)
