"""Fixed-width ticks as CUDA graphs, which the host starts before it knows the result of the ones before.

In an eager tick the device waits for the host several times. Here every pass has as many rows as requests may run
lanes. The device finds out by itself which of them are real, which leave, and which positions start. No shape depends
on a value. Two graphs suffice: a pass of the core, and a read-out, which ends with the inputs of the next
positions. The host learns the result of a pass while the next one runs. By it, it decides when lanes are read out, and
when a step is over.
Shapes: N rows of a pass or a read-out, of which some are real; D hidden size.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import transitions
from .attention.base import Rows
from .compile import ALONE, compiled
from .exits import RULES
from .graphs import GraphCache, padded, sizes
from .request import NEVER
from .state import State
from .tick import TickContext, TickReport


class Note(NamedTuple):
    """The result of a pass, as the host learns it.

    ran: its lanes.   exits: lanes that left.   waits, runs, drafts: decode lanes that then wait to be read out, run,
    and wait in waves.
    soonest, latest: passes after which the first of these leaves at the soonest, and the last at the latest.
    leaving: lanes of the next pass that leave in it, whatever their rules decide.   live: requests that are live.
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


@dataclass(eq=False)
class GraphState:
    """A State with the tensors by which passes follow each other without the host. Written by the steps below.

    every [N]: 0, 1, ...   order [N + 1]: running lanes, at the front.   runs: their number.   real: false while a graph
    is recorded, when no row is real.   note [9]: the newest `Note`.
    """

    state: State
    every: Tensor
    order: Tensor
    runs: Tensor
    real: Tensor
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
            note=zeros[room + 1 :].clone(),
        )


# ---- steps, recorded or compiled -------------------------------------------------------------------------------------
def _keep(graph: GraphState, order: Tensor, *counts: Tensor) -> Tensor:
    """Set the `order` in which lanes run, and the note, whose first five numbers are `counts`. Returns the note."""
    state, runs = graph.state, counts[3]
    graph.order[: len(order)].copy_(order)
    graph.runs.copy_(runs)
    lanes, number = state.lanes, torch.arange(len(order), device=order.device)
    running, left = number < runs, lanes.exit_at[order] - lanes.depth[order]
    soon = torch.where(lanes.may_exit[order] > 0, 1, left)
    next = running & (number < state.config.max_lanes) if state.config.max_lanes else running
    ahead = (
        torch.where(running, soon, NEVER).min(),
        torch.where(running, left, 0).max(),
        (next & (left <= 1)).sum(),
        state.requests.live.sum(),
    )
    note = torch.stack([*counts, *ahead])
    graph.note.copy_(note)
    return note


def _choose(graph: GraphState) -> Tensor:
    """As transitions.choose. Returns the note."""
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
    return empty


def _fetch(graph: GraphState, every: Tensor) -> tuple[Tensor, ...]:
    """Lanes of a read-out of `every` [N] rows. Returns, for each: lane; it is real; row; position; state [N, D]."""
    state = graph.state
    decodes = torch.arange(state.num_decode_lanes, device=every.device)
    waits = state.live_flags(state.lanes.waiting)
    place = torch.where(waits, waits.cumsum(0) - 1, len(graph.every))
    order = torch.zeros_like(graph.order).index_put((place,), decodes)
    real = (every < waits.sum()) & graph.real
    which = torch.where(real, order[every], state.spare)
    s, row, position = transitions.steps.fetch(state, which)
    return which, real, row, torch.where(real, position, 0), s


def _emit(
    graph: GraphState, which: Tensor, real: Tensor, row: Tensor, position: Tensor, tokens: Tensor
) -> tuple[Tensor, ...]:
    """Put out `tokens` [N], or the tokens known beforehand. Returns, for each: the lane in which it starts; it does
    start; its row; its position; the token."""
    state = graph.state
    known = state.requests.known_tokens[row, position + 1].long()
    tokens = torch.where(known > 0, known - 1, tokens)
    position, stopped = transitions.steps.emit(state, which, row, position, tokens)
    transitions.padding.clear_spare_count(state)
    there = real & ~stopped
    where = torch.where(there, state.lane_of(row, position), state.spare)
    row, position = torch.where(there, row, state.config.max_num_seqs), torch.where(there, position, 0)
    return where, there, row, position, tokens


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
    start: Callable[..., Tensor]


STEPS = GraphSteps(_choose, _enter, _settle, _fetch, _emit, _start)


class Mix(NamedTuple):
    """The traits of requests on which their shared graphs depend.

    exits: some have exit rules.   drawn, cut, penalised: some are sampled so.
    """

    exits: bool
    drawn: bool = False
    cut: bool = False
    penalised: bool = False

    def keys(self, width: int, rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Keys of a pass of `width` rows, and of a read-out of `rows`."""
        return ("pass", width, self.exits), ("read", rows, *self[1:])


class GraphTick:
    """A Tick for steps in which every request decodes plainly: the same tokens and depths as an eager tick, in passes
    that may have other lanes."""

    def __init__(self, context: TickContext, cache: GraphCache, is_over: Callable[[bool], bool], compile: bool = False):
        """`is_over`(a request has ended): the step should end now."""
        self.context, self.is_over, self.compiled = context, is_over, compile
        self.state, self.forward, self.rules = context.state, context.forward, context.rules
        self.schedule, self.work, self.counts = context.schedule, context.work, context.counts
        complete = self.state.policy.complete
        self.cache, self.possible = cache, self.forward.parts.compilable and not context.routing and not complete
        kinds = ("state", "gate") if self.forward.parts.config.exit_gate else ("state",)
        self.exits = frozenset(name for name, rule in RULES.items() if rule.reads in kinds)
        self.graph = GraphState.create(self.state)
        self.notes = Notes(self.graph.note)
        self.replays: dict[tuple[Any, ...], Callable[[], Any]] = {}
        self.steps = GraphSteps(*(compiled(step, **ALONE) for step in STEPS)) if compile else STEPS

    def fits(self) -> bool:
        """The step has no prompts, no request with several positions in flight, and no tokens or exits for which the
        host must look at logits."""
        in_use = self.work.in_use
        if self.work.chunks or any(in_use[name] for name in ("wave", "diffusion", "sampled_by_host", "host")):
            return False
        return self._few(self._rows()) and not self.rules.reading("logits")

    def _few(self, rows: int) -> bool:
        """So many rows are few enough for a graph."""
        return self.possible and rows <= self.cache.max_rows

    def _rows(self) -> int:
        """Rows of a read-out: every live request may have one."""
        return padded(max(self.work.resident, 1))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile everything now, on rows that are not real."""
        if not self.compiled:
            return
        some = self.graph.every[:3]
        self.graph.real.fill_(False)
        self._pass(some)
        self._read_out(some)
        self.graph.real.fill_(True)

    @torch.inference_mode()
    def record_common(self, exits: bool) -> None:
        """Record the graphs of common mixes of requests now, as many as are kept. No request may be resident.

        exits: requests have exit rules by default. Without these, a mix that has some is the least common.
        """
        mixes = [Mix(exits, cut=True), Mix(exits), Mix(exits, drawn=True), Mix(not exits)]
        of_size = sizes(min(self.state.config.max_num_seqs, self.cache.max_rows)) if self.possible else []
        keys = {key: mix for mix in mixes for n in of_size for key in mix.keys(self._width(n), n)}
        chosen = list(keys)[: self.cache.most]
        for key in sorted(chosen, key=lambda key: -key[1]):  # the smaller ones find room in the pool
            self._replay(key, keys[key])

    @contextmanager
    def _mixed(self, mix: Mix) -> Generator[None]:
        """Requests have the rules and the sampling of `mix`, as far as a graph depends on them."""
        rules, in_use, sampling = self.rules.in_use, self.work.in_use, ("drawn", "cut", "penalised")
        before = {name: in_use[name] for name in sampling}
        self.rules.in_use = set(self.exits) if mix.exits else set()
        in_use.update({name: int(getattr(mix, name)) - before[name] for name in sampling})
        try:
            yield
        finally:
            self.rules.in_use = rules
            in_use.update({name: before[name] - in_use[name] for name in sampling})
            for name in [name for name in sampling if not in_use[name]]:
                del in_use[name]

    def _width(self, rows: int) -> int:
        """Rows of a pass, of requests that may have `rows`."""
        return min(rows, padded(self.state.config.max_lanes or rows))

    def replay(self, width: int, rows: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Graphs of a pass of `width` rows, and of a read-out of `rows`, for the requests that there are.

        A graph has the computations of all exit rules, or of none: they are small, and what requests mix is open.
        """
        cut = self.work.in_use["cut"] > 0  # which samples what is drawn without cuts, too
        drawn, penalised = self.work.in_use["drawn"] > 0 and not cut, self.work.in_use["penalised"] > 0
        mix = Mix(bool(self.rules.in_use), drawn, cut, penalised)
        run, read = mix.keys(width, rows)
        return self._replay(run, mix), self._replay(read, mix)

    def recorded(self, n: int) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
        """Graphs of a pass and of a read-out of n lanes; None for more than graphs have."""
        return self.replay(padded(n), padded(n)) if self._few(n) else None

    def run(self, max_passes: int) -> TickReport:
        """As Tick.run; reports `max_passes`, too, once no request is left."""
        schedule, rows = self.schedule, self._rows()
        run_pass, read_out = self.replay(self._width(rows), rows)
        self.steps.choose(self.graph)
        known = Note(0, 0, *self.notes.now()[2:])
        reads, ended, passes, live = False, False, 0, known.live
        while passes < max_passes and known.live and (reads or known.runs or known.waits):
            run_pass()
            passes += 1
            self.notes.add()
            if passes > 1:
                known = self._learn()  # the pass before the one that is under way
                ended |= known.live < live
            waits = known.waits and not reads
            pending = bool(waits or known.soonest <= 1 or (reads and self.work.in_use["shallow"]))
            # Lanes that leave in the pass that is under way are not in the next one.
            running, idle = known.runs - known.leaving, not reads and known.latest <= 1
            reads = schedule.due(pending, running, forced=idle)
            if reads:
                read_out()
                self.counts.reads[rows] += 1
            if self.is_over(ended):
                break
        while len(self.notes):
            known = self._learn()
            ended |= known.live < live
        return TickReport(passes if known.live else max_passes, ended)

    def _learn(self) -> Note:
        """The note of the oldest pass that is not known yet."""
        note = self.notes.next()
        self.counts.passes[note.ran] += 1
        self.schedule.note(1, note.ran, note.exits)
        return note

    # ---- the recorded functions -----------------------------------------------------------------------------------
    def _replay(self, key: tuple[Any, ...], mix: Mix) -> Callable[[], Any]:
        """The replay of the function key[0] of key[1] rows, recorded for a `mix` when first asked for."""
        function, every = {"pass": self._pass, "read": self._read_out}[key[0]], self.graph.every[: key[1]]
        if key in self.replays:
            return self.cache.get(self.replays, key, key[1], lambda: None)
        self.graph.real.fill_(False)
        # A read-out prepares the memory of exit rules for the positions that start, whether one needs it or not.
        with self._mixed(mix if key[0] == "pass" else mix._replace(exits=True)):
            replay = self.cache.get(self.replays, key, key[1], lambda: function(every))
        self.graph.real.fill_(True)
        return replay

    def _pass(self, every: Tensor) -> None:
        forward, fills = self.forward, self.state.policy.fills
        which, real, row, position, depth, begun, limit, slot, write, leaves, before, e = self.steps.enter(
            self.graph, every
        )
        plan = forward.plan(Rows(forward.block_table, row, position, slot, write, True, fills))
        after = forward.recur(before, e, position, begun, limit, depth)
        if self.rules.in_use:
            converged = self.rules.converged(which, row, position, depth, before, after)
            leaves = leaves | (real & converged)
        empty = self.steps.settle(self.graph, which, real, row, position, depth, leaves, after)
        if fills:
            forward.attention.fill(plan, empty)

    def _read_out(self, every: Tensor) -> None:
        which, real, row, position, s = self.steps.fetch(self.graph, every)
        logits, best = self.forward.head(self.forward.read_out(s, row, position, real))
        tokens = self.context.sampler(logits, best, row, position + 1)
        where, there, row, position, tokens = self.steps.emit(self.graph, which, real, row, position, tokens)
        self.context.start(partial(self.steps.start, self.graph), where, row, position, tokens, only=there)


class Notes:
    """Copies of a tensor [K] after each pass, which the host reads later: on a GPU, when the device has finished that
    pass, and not when it has done everything started since."""

    def __init__(self, note: Tensor, most: int = 4):
        self.note = note
        pinned = note.is_cuda
        self.room = [torch.empty(len(note), dtype=note.dtype, device="cpu", pin_memory=pinned) for _ in range(most)]
        self.events = [torch.cuda.Event() if pinned else None for _ in range(most)]
        self.queue: deque[int] = deque()
        self.at = 0

    def __len__(self) -> int:
        return len(self.queue)

    def add(self) -> None:
        """Copy the tensor as it will be after the work started so far."""
        self.room[self.at].copy_(self.note, non_blocking=True)
        if event := self.events[self.at]:
            event.record(torch.cuda.current_stream(self.note.device))
        self.queue.append(self.at)
        self.at = (self.at + 1) % len(self.room)

    def next(self) -> Note:
        """The oldest copy that was not read yet. Waits for it."""
        at = self.queue.popleft()
        if event := self.events[at]:
            event.synchronize()
        return Note(*self.room[at].tolist())

    def now(self) -> Note:
        """The tensor as it is. Waits for the device."""
        return Note(*self.note.tolist())
