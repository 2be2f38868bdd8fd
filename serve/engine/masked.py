"""Ticks of a fixed width as CUDA graphs, which the host starts before it knows what came of the ones before.

A tick whose lanes the host chooses has the device wait for the host several times. Here every pass has as many rows as
requests may run lanes, and the device finds out by itself which of them are real, which leave, and what starts after
them: nothing of a tick's shape depends on a value. Two graphs suffice: a pass of the core, and a read-out, which ends
with the inputs of the positions that come next. The host learns what a pass has done while the next one runs, and
decides by it when lanes are read out, and when a step is over.
Shapes: N rows of a pass or a read-out, of which some are real; D width.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .attention import Rows
from .compiled import ALONE, compiled
from .diffusion import NEVER
from .exits import RULES
from .graphs import MOST, Record, padded
from .parts import start
from .passes import converged
from .readout import coda
from .tick import begin, choose, emit, enter, fetch, settle

if TYPE_CHECKING:
    from .loop import Loop


class Note(NamedTuple):
    """What a pass did, and left: lanes that `ran` in it; `exits`; then lanes that `wait` to be read out, and that run;
    after how many passes the first and the last of these leave, at the soonest and at the latest; how many the next one
    makes leave, whatever their rules say; requests that are live."""

    ran: int
    exits: int
    waits: int
    runs: int
    soonest: int
    latest: int
    leaving: int
    live: int


class Masked:
    """Runs a loop's ticks so, where all of its requests fit: for the same tokens and depths, in passes that may have
    other lanes. `record` as in graphs.Graphs."""

    def __init__(self, loop: Loop, record: Record, compile: bool = False):
        self.loop, self.record = loop, record
        self.most = MOST if loop.parts.compilable and not loop.routing and not loop.policy.complete else 0
        room, device = padded(loop.lanes.own), loop.device
        self.every = torch.arange(room, device=device)
        self.order = torch.zeros(room + 1, dtype=torch.long, device=device)  # lanes that run, at the front
        self.runs = torch.zeros((), dtype=torch.long, device=device)  # how many
        self.real = torch.ones((), dtype=torch.bool, device=device)  # no row is, while a graph is recorded
        self.yes = torch.ones(room, dtype=torch.bool, device=device)
        self.note = torch.zeros(len(Note._fields), dtype=torch.long, device=device)
        self.notes = Notes(self.note)
        self.replays: dict[tuple[Any, ...], Callable[[], Any]] = {}
        steps = (_enter, _settle, _fetch, _emit, _begin, _choose)
        self.enter, self.settle, self.fetch, self.emit, self.begin, self.choose = (
            (compiled(step, **ALONE) for step in steps) if compile else steps
        )

    def fits(self) -> bool:
        """Whether what is in flight can be run so: no prompts, several positions of a request, or tokens and exits that
        the host looks at."""
        loop, in_use = self.loop, self.loop.in_use
        if loop.chunks or loop.staggered or in_use["fenced"] or in_use["host"]:
            return False
        return self._rows() <= self.most and not any(RULES[name].reads == "logits" for name in loop.reading)

    def _rows(self) -> int:
        """Of a read-out: every request that is live may have one."""
        return padded(max(self.loop.resident, 1))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile what can be, on rows that are not real."""
        some = self.every[:3]
        self.real.fill_(False)
        self._pass(some)
        self._read(some)
        self.real.fill_(True)

    def graphs(self, width: int, rows: int) -> Iterator[Callable[[], Any]]:
        """A pass of `width` rows, and a read-out of `rows`, for the requests that there are."""
        rules = frozenset(self.loop.reading)
        sampling = tuple(self.loop.in_use[name] > 0 for name in ("drawn", "cut", "penalised"))
        for key, function in ((("pass", width, rules), self._pass), (("read", rows, rules, *sampling), self._read)):
            if key not in self.replays:
                self._add(key, function, self.every[: key[1]])
            yield self.replays[key]

    def run(self, most: int) -> int:
        """Up to `most` ticks. Returns how many; `most`, too, where no request is left before."""
        loop, rows = self.loop, self._rows()
        one, other = self.graphs(min(rows, padded(loop.width or rows)), rows)
        self.choose(self)
        known = Note(0, 0, *self.notes.now()[2:])
        begun, age, ticks, live = False, loop.waited, 0, known.live
        while ticks < most and known.live and (begun or known.runs or known.waits):
            one()
            ticks += 1
            self.notes.add()
            if ticks > 1:
                known = self._learn(live)  # of the pass before the one that is under way
            waits = known.waits and not begun
            age += bool(waits or known.soonest <= 1 or (begun and loop.in_use["shallow"]))
            idle = not begun and known.latest <= 1
            begun = age > 0 and (idle or not (age <= loop.coda_wait or self._full(known)))
            if begun:
                other()
                loop.counts.reads[rows] += 1
                age = 0
            if loop.is_over():
                break
        while len(self.notes):
            known = self._learn(live)
        loop.order, loop.unread, loop.waited = None, True, age
        return ticks if known.live else most

    def _learn(self, live: int) -> Note:
        """What the next pass has done; `live` requests were there before."""
        note, loop = self.notes.next(), self.loop
        loop.ended |= note.live < live
        loop.counts.passes[note.ran] += 1
        loop.load = [a + b for a, b in zip(loop.load, (1, note.ran, note.exits), strict=True)]
        return note

    def _full(self, note: Note) -> bool:
        """As in readout: whether passes are full without the lanes that wait. Those who leave in the one that is under
        way are not in the next one."""
        return bool(self.loop.costs and self.loop.width) and note.runs - note.leaving >= self.loop.width

    # ---- what is recorded -----------------------------------------------------------------------------------------
    def _add(self, key: tuple[Any, ...], function: Callable[[torch.Tensor], None], every: torch.Tensor) -> None:
        self.real.fill_(False)
        run = lambda: function(every)  # noqa: E731
        try:
            self.replays[key] = self.record(run)
        except RuntimeError as error:
            warnings.warn(f"ticks run without CUDA graphs, as a {key[0]} of {key[1]} has none: {error}", stacklevel=2)
            self.replays[key], self.most = run, 0
        self.real.fill_(True)

    def _pass(self, every: torch.Tensor) -> None:
        loop = self.loop
        which, real, row, position, depth, begun, slot, write, leaves, before, e = self.enter(self, every)
        plan = loop.attention.plan(Rows(loop.requests.table, row, position, slot, write, True, loop.policy.fills))
        after = loop.recur(loop.parts, before, e, position, begun, depth)
        if loop.reading:
            leaves = leaves | (real & converged(loop, loop.reading, which, row, position, depth, before, after))
        empty = self.settle(self, which, real, row, position, depth, leaves, after)
        if loop.policy.fills:
            loop.attention.fill(plan, empty)

    def _read(self, every: torch.Tensor) -> None:
        loop = self.loop
        which, real, row, position, s = self.fetch(self, every)
        said, best = loop.head(loop.parts, coda(loop, s, row, position, real))
        tokens = loop.sampler(said, best, row, position + 1)
        where, there, row, position, tokens = self.emit(self, which, real, row, position, tokens)
        e = loop.prelude(tokens, row, position, there)
        self.begin(self, where, row, position, tokens, self.yes[: len(every)], e, start(loop.parts, e, position))
        if loop.reading:
            loop.rules.begin(where, loop.reading)


def _keep(masked: Masked, order: torch.Tensor, *counts: torch.Tensor) -> torch.Tensor:
    """Lanes run in this `order`; `counts` are the first four of a `Note`. Returns all of it."""
    loop, runs = masked.loop, counts[3]
    masked.order[: len(order)].copy_(order)
    masked.runs.copy_(runs)
    lanes, number = loop.lanes, torch.arange(len(order), device=order.device)
    running, left = number < runs, lanes.target[order] - lanes.depth[order]
    soon = torch.where(lanes.free[order] > 0, 1, left)
    next = running & (number < loop.width) if loop.width else running
    ahead = (
        torch.where(running, soon, NEVER).min(),
        torch.where(running, left, 0).max(),
        (next & (left <= 1)).sum(),
        loop.requests.live.sum(),
    )
    note = torch.stack([*counts, *ahead])
    masked.note.copy_(note)
    return note


def _choose(masked: Masked) -> torch.Tensor:
    """Which lanes run. Returns what `Note` says of them."""
    return _chosen(masked, *choose(masked.loop))


def _chosen(masked: Masked, order: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(masked.runs)
    return _keep(masked, order, zero, zero, *counts)


def _enter(masked: Masked, every: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Lanes of a pass [N], whether each is real; row, position and depth of each, and whether it has begun; the KV slot
    that it has, and whether it writes there; whether it leaves, if no rule ends it before [N]; its state and its input
    [N, D]."""
    loop, policy = masked.loop, masked.loop.policy
    runs = masked.runs.clamp(max=loop.width) if loop.width else masked.runs
    real = (every < runs) & masked.real
    which = torch.where(real, masked.order[every], loop.lanes.spare)
    row, position, depth, _, _, s, _ = enter(loop, which)
    depth = torch.where(real, depth, 0)
    writes = policy.writes(depth)
    write = real if writes is None else real & writes
    leaves = real & (loop.lanes.target[which] - depth <= 1)
    e = loop.lanes.e[which] if loop.keeps_input else s
    return which, real, row, position, depth, depth > 0, policy.slot(depth), write, leaves, s, e


def _settle(
    masked: Masked,
    which: torch.Tensor,
    real: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    depth: torch.Tensor,
    leaves: torch.Tensor,
    after: torch.Tensor,
) -> torch.Tensor:
    """A pass has brought lanes to `after` [N, D], and some leave. Returns how many KV slots are left empty by each."""
    loop = masked.loop
    after = torch.where(real[:, None], after, 0)
    counts, empty, order = settle(loop, which, row, position, depth, after, leaves)
    exits, _, waits, runs = counts
    _keep(masked, order, real.sum(), exits, waits, runs)
    return empty


def _fetch(masked: Masked, every: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Lanes of a read-out [N], whether each is real, row and position of each, and its state [N, D]."""
    loop = masked.loop
    lanes, own = loop.lanes, torch.arange(loop.lanes.own, device=every.device)
    waits = lanes.own_of_live(lanes.waiting, loop.requests.live)
    place = torch.where(waits, waits.cumsum(0) - 1, len(masked.every))
    order = torch.zeros_like(masked.order).index_put((place,), own)
    real = (every < waits.sum()) & masked.real
    which = torch.where(real, order[every], lanes.spare)
    s, row, position = fetch(loop, which)
    return which, real, row, torch.where(real, position, 0), s


def _emit(
    masked: Masked,
    which: torch.Tensor,
    real: torch.Tensor,
    row: torch.Tensor,
    position: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Put out `tokens` [N]. Returns the lanes in which they start, whether they do, row and position of each, and the
    tokens [N]: those that are known beforehand, where they are."""
    loop = masked.loop
    lanes, requests = loop.lanes, loop.requests
    known = requests.script[row, position + 1].long()
    tokens = torch.where(known > 0, known - 1, tokens)
    position, stopped = emit(loop, which, row, position, tokens)
    requests.count[-1:].zero_()  # of the spare row, which puts out a token every time
    there = real & ~stopped
    where = torch.where(there, lanes.of(row, position), lanes.spare)
    row, position = torch.where(there, row, requests.rows), torch.where(there, position, 0)
    return where, there, row, position, tokens


def _begin(masked: Masked, *of: torch.Tensor) -> torch.Tensor:
    """As tick.begin. Returns what `Note` says of the lanes that then run."""
    return _chosen(masked, *begin(masked.loop, *of))


# ---- what the host learns -------------------------------------------------------------------------------------------
class Notes:
    """Copies of a tensor [K] as it was after one thing or another, which the host reads later: on a GPU, when the
    device has got so far, and not when it has done all that it was given since."""

    def __init__(self, note: torch.Tensor, most: int = 4):
        self.note = note
        pinned = note.is_cuda
        self.room = [torch.empty(len(note), dtype=note.dtype, device="cpu", pin_memory=pinned) for _ in range(most)]
        self.events = [torch.cuda.Event() if pinned else None for _ in range(most)]
        self.queue: deque[int] = deque()
        self.at = 0

    def __len__(self) -> int:
        return len(self.queue)

    def add(self) -> None:
        self.room[self.at].copy_(self.note, non_blocking=True)
        if event := self.events[self.at]:
            event.record(torch.cuda.current_stream(self.note.device))
        self.queue.append(self.at)
        self.at = (self.at + 1) % len(self.room)

    def next(self) -> Note:
        """The oldest that was not read yet."""
        at = self.queue.popleft()
        if event := self.events[at]:
            event.synchronize()
        return Note(*self.room[at].tolist())

    def now(self) -> Note:
        return Note(*self.note.tolist())
