"""What a tick does to the state of lanes and requests: functions of whole tensors, without a host's look at any value,
each of which can be compiled (see compiled.py).

Shapes: n lanes of a pass, m lanes that are read out or start, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .exits import NUMBER

if TYPE_CHECKING:
    from .loop import Loop


def enter(loop: Loop, which: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Lanes `which` [n] take part in a pass. Returns row, position and depth of each, whether it has begun and whether
    it leaves after this one [n], how many leave KV slots empty [], and the states [n, D]."""
    lanes = loop.lanes
    row, depth = lanes.row[which], lanes.depth[which]
    leaves = depth + 1 >= lanes.target[which]
    if loop.policy.complete:
        leaves = leaves & ~lanes.exited[which]
    early = (leaves & (depth + 1 < loop.requests.limit[row])).sum()
    return row, lanes.position[which], depth, depth > 0, leaves, early, lanes.s[which]


def settle(
    loop: Loop,
    which: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    depth: torch.Tensor,
    after: torch.Tensor,
    leaves: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """A pass has brought lanes `which` [n] to `after` [n, D], and some leave. Returns how many do, how many run no
    longer, and how many KV slots are left empty [3]; how many [n] by each; and of the next pass, if all stay, depth and
    leaves [n], and how many leave slots empty []."""
    lanes, requests, policy = loop.lanes, loop.requests, loop.policy
    own, done, limit = which < lanes.own, depth + 1, requests.limit[row]
    # Of the lanes with a complete policy, only those of a diffusion have a target beyond the limit.
    runs = (done < limit) | (lanes.target[which] > limit) if policy.complete else ~leaves
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
    lanes_of = ((row[:, None] == rows) & own[:, None]).sum(0)
    requests.items += lanes_of
    requests.ticks += lanes_of > 0
    requests.phase += (lanes_of > 0) & requests.refines
    empty = torch.where(leaves, policy.empty(done, limit), 0) if policy.fills else torch.zeros_like(done)
    following = done + 1 >= lanes.target[which]
    if policy.complete:
        following = following & ~lanes.exited[which]
    early = (following & (done + 1 < limit)).sum()
    return torch.stack([leaves.sum(), (~runs).sum(), empty.sum()]), empty, done, following, early


def emit(loop: Loop, which: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Put out the guesses of lanes `which` [m], one a row at most. Returns row, position and token of what comes next,
    and whether the request has stopped [m]."""
    lanes, requests = loop.lanes, loop.requests
    row, position, tokens, left = lanes.row[which], lanes.position[which], lanes.guess[which], lanes.left[which]
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
    return row, position, tokens, stopped


def begin(
    loop: Loop,
    where: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
    may_exit: torch.Tensor,
) -> torch.Tensor:
    """Start tokens [m] at depth 0 in lanes `where` [m]. Those that may not exit ([m]) run to their request's limit,
    whatever its rule. Returns the depth [m] at which each leaves, if no rule ends it before."""
    lanes, requests = loop.lanes, loop.requests
    forced = requests.trace[row, position].long()
    free = (requests.rule[row] != NUMBER["fixed"]) & (forced == 0) & may_exit
    target = torch.where(forced > 0, forced, requests.limit[row])
    lanes.begin(where, row, position, target, free.long(), tokens)
    return target
