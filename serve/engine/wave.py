"""The exact wave: positions of one request in flight at staggered depths, whose tokens are those of plain decoding.

Every lane is read out after every recurrence. The position after it starts from the token that this says, one tick
behind, so that it finds keys and values of every depth that it needs. Where a later read-out says another token, all
that stands to the right of it is dropped and starts anew. A token is out once its lane has exited and all before it are
out: then it started from the right token, and attended to the right keys and values.
Shapes: m rows with a wave, W the greatest width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .loop import Loop


def speculative(loop: Loop) -> torch.Tensor:
    """Lanes [n] of live waves that have recurred and whose tokens are not out."""
    lanes, requests = loop.lanes, loop.requests
    row = lanes.row[: lanes.own]
    open = requests.live[row] & (requests.wave[row] > 1) & lanes.open[: lanes.own]
    which = (open & (lanes.depth[: lanes.own] > 0)).nonzero().squeeze(1)
    if not len(which):
        return which
    row, alone = row[which], torch.bincount(row[open], minlength=len(requests.wave)) == 1
    return which[lanes.exited[which] | ~alone[row] | (allowed(loop)[row] > 1)]


def advance(loop: Loop, rows: torch.Tensor) -> None:
    """After a read-out of waves `rows` [m]: drop what stands on a changed token, put out what is certain, and start one
    more position."""
    lanes, requests = loop.lanes, loop.requests
    offsets = torch.arange(int(requests.wave[rows].max()), device=rows.device)
    first = requests.frontier[rows][:, None]
    lane = lanes.of(rows[:, None], first + offsets)  # [m, W]
    there = lanes.open[lane] & (lanes.position[lane] == first + offsets) & (offsets < requests.wave[rows][:, None])
    guess, token = lanes.guess[lane], lanes.token[lane]
    right = there.clone()
    right[:, 1:] &= token[:, 1:] == guess[:, :-1]
    right = right.long().cumprod(1).bool()
    dropped = lane[there & ~right]
    lanes.running[dropped] = lanes.open[dropped] = lanes.exited[dropped] = False

    certain = (right & lanes.exited[lane]).long().cumprod(1).bool()
    going = torch.ones_like(rows, dtype=torch.bool)
    for offset in offsets.tolist():
        out = certain[:, offset] & going
        if not bool(out.any()):
            break
        loop.emit(lane[out, offset])
        going &= requests.live[rows]

    last = right.sum(1) - 1  # the rightmost that stands
    ends = lane.gather(1, last[:, None]).squeeze(1)
    position = lanes.position[ends] + 1
    wide = position - requests.frontier[rows] < allowed(loop)[rows]
    starts = going & wide & (lanes.guess[ends] >= 0) & (position < requests.length)
    loop.begin_next(rows[starts], position[starts], lanes.guess[ends][starts])


def allowed(loop: Loop) -> torch.Tensor:
    """How wide each row's wave [rows] may be now: lanes are for what is certain first, and waves share what is left."""
    requests, budget = loop.requests, loop.width or loop.budget
    if not budget:
        return requests.wave
    waves = requests.live & (requests.wave > 1)
    left = budget - int(requests.live.sum()) - sum(wave.last - wave.first - 1 for wave in loop.waves.values())
    return requests.wave.clamp(max=1 + max(0, left) // max(int(waves.sum()), 1))


def most(loop: Loop, own: torch.Tensor) -> int:
    """Lanes of a pass: of lanes `own` [n], those that are certain, and others up to the budget."""
    lanes, requests = loop.lanes, loop.requests
    row = lanes.row[own]
    certain = (lanes.position[own] <= requests.frontier[row]) | requests.refines[row]
    return max(loop.budget, int(certain.sum()))
