"""Read-outs: lanes that have left go through coda and head, several at once, and the tokens that come of them start the
next positions in the same step.

Shapes: m lanes that are read out, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from .attention import Rows
from .parts import read_out
from .wave import advance

if TYPE_CHECKING:
    from .loop import Loop

# (logits [m, V], the likeliest tokens [m] by them, rows [m], positions [m] of the tokens) -> tokens [m]
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# (what the head reads [m, D], rows [m], positions [m] of prompt tokens)
Reader = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


def ready(loop: Loop, idle: bool) -> torch.Tensor:
    """Lanes [m] to be read out now: prompts that are through, and, when enough of them wait, the others. `idle`: no
    pass has run."""
    lanes = loop.lanes
    if not loop.unread and not loop.chunks:
        return loop.none
    done = [chunk for chunk in loop.chunks if not bool(lanes.running[chunk.first : chunk.last].any())]
    if not (done or idle) and loop.waits and (_full(loop) or _more_within(loop, loop.coda_wait - loop.waited)):
        loop.waited += 1
        return loop.none
    which = lanes.of_live(lanes.waiting, loop.requests.live)
    loop.waited, loop.unread = 0, False
    loop.chunks = [chunk for chunk in loop.chunks if chunk not in done]
    prompts = [torch.arange(chunk.first, chunk.last, device=loop.device) for chunk in done]
    return torch.cat([which, *prompts]) if done else which


def _full(loop: Loop) -> bool:
    """Whether passes are as wide as they may be without the lanes that wait: then these may, at no cost."""
    return bool(loop.costs and loop.width) and loop.runs >= loop.width


def _more_within(loop: Loop, ticks: int) -> bool:
    """Whether another lane may leave within so many ticks; one with a rule may at any time."""
    if ticks <= 0:
        return False
    lanes = loop.lanes
    which = lanes.of_live(lanes.running, loop.requests.live)
    return bool(((lanes.free[which] > 0) | (lanes.target[which] - lanes.depth[which] <= ticks)).any())


def coda(
    loop: Loop, s: torch.Tensor, row: torch.Tensor, position: torch.Tensor, only: torch.Tensor | None = None
) -> torch.Tensor:
    """What the head reads [m, D] of states s [m, D] of rows at positions [m], a row's in order. `only` [m]: which of
    them there are; no two are of one row then."""
    if loop.parts.config.coda:
        rows = Rows(loop.requests.table, row, position, torch.zeros_like(row), only, alone=only is not None)
        loop.attention.plan(rows)
    return read_out(loop.parts, s, position)


def read(loop: Loop, waiting: torch.Tensor, ahead: torch.Tensor) -> None:
    """Read out lanes that have left, and lanes of waves that may not have."""
    lanes = loop.lanes
    prompts = bool(len(waiting)) and int(waiting[-1]) >= lanes.own
    if prompts and not loop.parts.config.coda:  # which has keys and values of every position
        lanes.waiting[waiting] = False
        waiting = waiting[lanes.emits[waiting] | _shown(loop, waiting)]
    which = waiting
    if len(ahead):  # the coda wants a row's positions in order
        which = torch.cat([waiting, ahead])
        which = which[(lanes.row[which] * (loop.requests.length + 2) + lanes.position[which]).argsort()]
    if not len(which):
        return
    s, row, position = loop.steps.fetch(loop, which)
    x = coda(loop, s, row, position)
    loop.counts.reads[len(which)] += 1
    said = [which, row, position, x]
    if prompts:
        shown = _shown(loop, which)
        if loop.reader is not None and bool(shown.any()):
            loop.reader(x[shown], row[shown], position[shown])
        emits = lanes.emits[which]
        said = [each[emits] for each in said]
    if loop.in_use["fenced"]:
        fenced = loop.requests.fenced[said[1]]
        if bool(fenced.any()):
            loop.parked.append([each[fenced] for each in said])
            said = [each[~fenced] for each in said]
    if len(said[0]):
        sample(loop, loop.sampler, *said)


def _shown(loop: Loop, which: torch.Tensor) -> torch.Tensor:
    """Whether each of lanes `which` is a prompt position that the reader gets."""
    return loop.requests.shown[loop.lanes.row[which]] & (which >= loop.lanes.own)


def sample(
    loop: Loop, sampler: Sampler, which: torch.Tensor, row: torch.Tensor, position: torch.Tensor, x: torch.Tensor
) -> None:
    """Tokens that come of lanes `which`, of rows at positions [m], whose read-out is x [m, D], and the positions that
    they start."""
    lanes, requests = loop.lanes, loop.requests
    following = position + 1
    said, tokens = loop.head(loop.parts, x)
    if any(loop.in_use[name] for name in ("drawn", "cut", "penalised", "host")):
        some = requests.samples[row].nonzero().squeeze(1)
        if len(some):
            tokens[some] = sampler(said[some], tokens[some], row[some], following[some])
    if loop.in_use["script"]:
        known = requests.script[row, following].long()
        tokens = torch.where(known > 0, known - 1, tokens)
    if not loop.in_use["wave"]:
        loop.put_out(which, row, position, tokens)
        return
    lanes.guess[which] = tokens
    plain = (requests.wave[row] == 1) | (which >= lanes.own)
    loop.put_out(which[plain], row[plain], position[plain], tokens[plain])
    if not bool(plain.all()):
        advance(loop, row[~plain].unique())
