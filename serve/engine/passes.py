"""Passes of the core: which lanes run in the next one, how many follow each other without a look at lanes, and what
leaves after them.

Shapes: n lanes of a pass, D width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .attention import Rows
from .exits import NUMBER, Readings
from .readout import coda
from .wave import most

if TYPE_CHECKING:
    from .loop import Loop

PROMPT = 64  # prompt lanes, which are all at one depth, that are worth a pass of their own, without others' LoRA


def runnable(loop: Loop) -> torch.Tensor:
    """Lanes [n] of the next pass."""
    lanes, live = loop.lanes, loop.requests.live
    if loop.order is None:
        loop.order, counts = loop.steps.choose(loop)
        loop.waits, loop.runs = counts.tolist()
    staggered = loop.staggered
    turns = 0 if staggered or loop.policy.complete else loop.width
    which = own = loop.order[: min(loop.runs, turns or loop.runs)]
    if loop.chunks:
        rest = slice(lanes.own, loop.chunks[-1].last)
        of_prompts = (lanes.running[rest] & live[lanes.row[rest]]).nonzero().squeeze(1) + lanes.own
        which = torch.cat([own, of_prompts])
    width = loop.width or (most(loop, own) if loop.budget and staggered else 0)
    if not width or len(own) <= width:
        return which
    rows = loop.requests.rows
    row = lanes.row[own]
    ahead = lanes.position[own] - loop.requests.frontier[row]  # no position may overtake the one before it
    together = loop.requests.refines[row]
    order = (ahead.masked_fill(together, 0) * rows + (row - loop.turn[0]) % rows).argsort(stable=True)
    chosen = own[order[:width]]
    cut = lanes.row[own[order[width]]]  # a diffusion runs whole, or waits
    if loop.requests.refines[cut] and len(partial := (lanes.row[chosen] == cut).nonzero()):
        chosen = chosen[: int(partial[0])] if int(partial[0]) else own[row == cut]
    loop.turn[1] = (lanes.row[chosen[-1]] + 1) % rows
    return torch.cat([chosen.sort().values, which[len(own) :]])


def run(loop: Loop, which: torch.Tensor, most: int) -> int:
    """Run lanes `which` [n] to the first exit, in `most` passes at most. Returns how many."""
    lanes, requests, policy = loop.lanes, loop.requests, loop.policy
    row, position, depth, begun, first, before, counts = loop.steps.enter(loop, which)
    until, early, longest = counts.tolist()
    rules = loop.reading
    special = rules or loop.routing or loop.staggered  # what looks at lanes after every pass
    passes = 1 if special or loop.unread else min(until, most)
    pass_of = depth
    if loop.waves:  # each step of a diffusion goes through the same recurrences, and over their slots
        pass_of = torch.where(requests.refines[row] & (which < lanes.own), requests.phase[row], depth)
    place = position
    if loop.routing:
        place, longest = loop.routing.places(row, position, depth), 0
    alone = not (loop.chunks or loop.staggered or policy.complete)
    e = lanes.e.index_select(0, which) if loop.keeps_input else None
    own = int((which < lanes.own).sum()) if loop.relaxed and loop.chunks else len(which)
    own = own if len(which) - own >= PROMPT else len(which)
    fills = policy.fills and (bool(rules) or (early > 0 and passes == until))
    after, plans = before, []
    for last in range(passes - 1, -1, -1):
        if plans:
            begun, depth = loop.always[: len(which)], depth + 1
            pass_of, before = depth, after
        slot, writes = policy.slot(pass_of), policy.writes(pass_of)
        moved = (plans[0], policy.step) if len(plans) == 1 and policy.step is not None else None
        rows = Rows(requests.table, row, place, slot, writes, alone, fills and not last, moved, longest)
        plans, after = _pass(loop, rows, own, before, before if e is None else e, position, begun, pass_of)
    leaves = first if passes == until else loop.never[: len(which)]
    if loop.routing:
        after, leaves = loop.routing.combine(which, depth, before, after)
    if rules:
        leaves = leaves | converged(loop, rules, which, row, position, depth, before, after)
    counts, empty, loop.order = loop.steps.settle(loop, which, row, position, depth, after, leaves)
    exits, empties, loop.waits, loop.runs = counts.tolist()
    loop.unread |= exits > 0
    if not loop.chunks:
        new = (passes, passes * len(which), exits)
        loop.load = [a + b for a, b in zip(loop.load, new, strict=True)]
    if exits and loop.routing:
        gone = which[leaves]
        lanes.left[gone] = loop.routing.recurrences(gone, lanes.depth[gone])
    if empties:
        parts = empty.split([n for n in (own, len(which) - own) if n])
        slots = [empties] if len(parts) == 1 else torch.stack([some.sum() for some in parts]).tolist()
        for plan, some, count in zip(plans, parts, slots, strict=True):
            if count:
                loop.attention.fill(plan, some, count)
    return passes


def _pass(loop: Loop, rows: Rows, own: int, *inputs: torch.Tensor) -> tuple[list[Any], torch.Tensor]:
    """A pass of the core over the first `own` of `rows`, and one over the others, which are at one depth; `inputs`
    as in parts.recur. Returns attention's plan of each, and the new states [n, D]."""
    n = len(rows.request)
    if 0 < own < n:
        first, rest = slice(0, own), slice(own, n)
        plans, of_own = _pass(loop, rows.part(first), own, *(each[first] for each in inputs))
        more, others = _pass(loop, rows.part(rest), 0, *(each[rest] for each in inputs))
        return plans + more, torch.cat([of_own, others])
    loop.counts.passes[n] += 1
    if own and loop.graphs and loop.graphs.fit(n):
        plan, after = loop.graphs(rows, *inputs)
    else:
        plan = loop.attention.plan(rows)
        after = (loop.recur if own else loop.recur_alike)(loop.parts, *inputs)
    return [plan], after


def converged(
    loop: Loop,
    rules: set[str],
    which: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    depth: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """Whether lanes `which` [n] are to leave by their `rules`."""
    free = (loop.lanes.free[which] > 0) & ~loop.lanes.exited[which]
    rule = torch.where(free, loop.requests.rule[row], NUMBER["fixed"])
    readings = Readings(
        before,
        after,
        lambda: loop.parts.gate(after),
        lambda some: coda(loop, after[some], row[some], position[some]),
        lambda x: loop.logits(loop.parts, x),
    )
    converged = loop.rules.check(rules, which, rule, loop.requests.threshold[row], readings)
    return converged & (depth + 1 >= loop.requests.minimum[row])
