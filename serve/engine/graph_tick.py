"""Fixed-width ticks as CUDA graphs, which the host starts before it knows the result of the ones before.

In an eager tick the device waits for the host several times. Here every pass has as many rows as requests may run
lanes, as far as graphs have them; those nearest to their row's next token go first. The device finds out by itself
which rows are real, which lanes leave, which tokens are put out and which positions start. Two graphs suffice: a pass
of the core, and a read-out, which ends with the inputs of the next positions. The host learns the result of a pass
while the next one runs. By it, it decides when lanes are read out, and when a step is over. Drafts of waves are read
out every so many passes, whatever the result.
Shapes: N rows of a pass or a read-out, M rows that may start a position.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention.base import Rows
from .compile import ALONE, compiled
from .exits import RULES
from .graph_steps import STEPS, GraphState, GraphSteps, Note, keep_order, with_known
from .graphs import GraphCache, padded, sizes
from .notes import Notes
from .tick import TickContext, TickReport
from .transitions.drafts import beyond_widths


class Mix(NamedTuple):
    """The traits of requests on which their shared graphs depend.

    exits: some have exit rules.   drawn, cut, penalised: some are sampled so.   logprobs: some ask for these.
    """

    exits: bool
    drawn: bool = False
    cut: bool = False
    penalised: bool = False
    logprobs: bool = False

    def keys(self, sizes: Sizes) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Keys of a pass and of a read-out of these sizes."""
        return ("pass", sizes.width, self.exits, sizes.crowded), ("read", sizes.reads, sizes.starts, *self[1:])


class Sizes(NamedTuple):
    """Rows of graphs. width: of a pass.   crowded: it may lack room for all lanes that run.   reads: of a read-out.
    starts: of the positions that start where there are waves; 0: plain requests start those that are read out.

    Where there are waves, `reads` is a power of two, and `starts` follows from it: any mix of them with plain requests
    has one of a few read-outs."""

    width: int
    crowded: bool
    reads: int
    starts: int = 0


class GraphTick:
    """A Tick for steps without prompts and diffusions: the same tokens and depths as an eager tick, in passes that may
    have other lanes."""

    def __init__(self, context: TickContext, cache: GraphCache, is_over: Callable[[bool], bool], compile: bool = False):
        """`is_over`(a request has ended): the step should end now."""
        self.context, self.is_over, self.compiled = context, is_over, compile
        self.state, self.forward, self.rules = context.state, context.forward, context.rules
        self.schedule, self.work, self.counts = context.schedule, context.work, context.counts
        self.cache, self.possible = cache, self.forward.parts.compilable and not context.routing
        kinds = ("state", "gate") if self.forward.parts.config.exit_gate else ("state",)
        self.exits = frozenset(name for name, rule in RULES.items() if rule.reads in kinds)
        self.graph = GraphState.create(self.state)
        self.notes = Notes(self.graph.note)
        self.replays: dict[tuple[Any, ...], Callable[[], Any]] = {}
        self.steps = GraphSteps(*(compiled(step, **ALONE) for step in STEPS)) if compile else STEPS
        self.planned = Sizes(1, False, 1)  # of the next run

    def fits(self) -> bool:
        """The step has no prompts, no diffusion, and no tokens or exits for which the host must look at logits.

        If so, `run` may follow.
        """
        in_use = self.work.in_use
        if self.work.chunks or any(in_use[name] for name in ("diffusion", "sampled_by_host", "host")):
            return False
        if not self.possible or self.rules.reading("logits"):
            return False
        self.planned = self.sizes()
        return self._few(self.planned.reads)

    def _few(self, rows: int) -> bool:
        """So many rows are few enough for a graph."""
        return self.possible and rows <= self.cache.max_rows

    def sizes(self, rows: int = 0, exits: bool = False, positions: int = 1) -> Sizes:
        """Sizes for the requests of this step, or for `rows` others, with exits or at full depth and so many
        `positions` in flight.

        Every request may have a lane, and waves as many as they are wide, within the budget. Where exits leave
        recurrences behind them, all depths of a row may run. Waits for the device where a budget binds.
        """
        state, budget = self.state, self.state.config.max_lanes or self.work.budget
        resident = rows or max(self.work.resident, 1)
        drafts = rows * (positions - 1) if rows else sum(most - 1 for _, most in self.work.waves.values())
        lanes = all_lanes = resident + drafts
        lanes = min(lanes, max(budget, resident)) if budget else lanes
        reads, starts = padded(lanes), 0
        if drafts:
            beyond = int(beyond_widths(state)) if lanes < all_lanes and not rows else 0
            reads = 1 << (min(lanes + beyond, all_lanes) - 1).bit_length()
            starts = min(reads, state.config.max_num_seqs)
        exits = exits if rows else bool(self.rules.in_use) or self.work.in_use["trails"] > 0
        trails = state.policy.complete and exits
        lanes = max(lanes, resident * state.policy.depths) if trails else lanes
        room = min(padded(lanes), padded(state.config.max_lanes or lanes), self.cache.max_rows or lanes)
        most = min(room, state.config.max_lanes or room)
        staggered = drafts > 0 or state.policy.complete
        crowded = staggered and max(lanes, all_lanes) > most  # positions in flight may exceed a budget
        return Sizes(room, crowded, reads, starts)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile everything now, on rows that are not real."""
        if not self.compiled:
            return
        some = self.graph.every[:3]
        self.graph.real.fill_(False)
        self.steps.choose(self.graph)
        self._pass(some, False)
        self._read_out(some, 0)
        if self.state.config.max_in_flight > 1:
            self._read_out(some, 2)
        self.graph.real.fill_(True)

    @torch.inference_mode()
    def record_common(self, exits: bool, positions: int = 1) -> None:
        """Record the graphs of common mixes of requests now, as many as are kept. No request may be resident.

        exits: requests have exit rules by default. Without these, a mix that has some is the least common.
        positions: those that a request has in flight by default. With several, plain requests are less common.
        """
        mixes = [Mix(exits, cut=True), Mix(exits), Mix(exits, drawn=True), Mix(not exits)]
        most = min(self.state.config.max_num_seqs, self.cache.max_rows) if self.possible else 0
        wanted = [(mix, n, 1) for mix in mixes for n in sizes(most)]
        if positions > 1:
            wanted = [(mix, n, positions) for mix in mixes for n in range(most, 0, -1)] + wanted
        of_mix = [(mix, self.sizes(n, mix.exits, wide)) for mix, n, wide in wanted]
        keys = {key: mix for mix, found in of_mix if self._few(found.reads) for key in mix.keys(found)}
        chosen = list(keys)[: self.cache.most]
        for key in sorted(chosen, key=lambda key: -key[1]):  # the smaller ones find room in the pool
            self._replay(key, keys[key])

    @contextmanager
    def _mixed(self, mix: Mix) -> Generator[None]:
        """Requests have the rules and the sampling of `mix`, as far as a graph depends on them."""
        rules, in_use, sampling = self.rules.in_use, self.work.in_use, ("drawn", "cut", "penalised", "logprobs")
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

    def _wide(self) -> bool:
        """The budget leaves waves lanes for drafts."""
        budget, waves = self.state.config.max_lanes or self.work.budget, len(self.work.waves)
        return waves > 0 and (not budget or budget - self.work.resident >= waves)

    def replay(self, sizes: Sizes) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Graphs of a pass and a read-out of these sizes, for the requests that there are.

        A graph has the computations of all exit rules, or of none: they are small, and what requests mix is open.
        """
        cut = self.work.in_use["cut"] > 0  # which samples what is drawn without cuts, too
        drawn, penalised = self.work.in_use["drawn"] > 0 and not cut, self.work.in_use["penalised"] > 0
        mix = Mix(bool(self.rules.in_use), drawn, cut, penalised, self.work.in_use["logprobs"] > 0)
        run, read = mix.keys(sizes)
        return self._replay(run, mix), self._replay(read, mix)

    def recorded(self, n: int) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
        """Graphs of a pass and of a read-out of n lanes; None for more than graphs have."""
        return self.replay(Sizes(padded(n), False, padded(n))) if self._few(n) else None

    def run(self, max_passes: int) -> TickReport:
        """As Tick.run; reports `max_passes`, too, once no request is left."""
        schedule, wide = self.schedule, self._wide()
        run_pass, read_out = self.replay(self.planned)
        self.steps.choose(self.graph)
        known = Note(0, 0, *self.notes.now()[2:])
        reads, ended, passes, live = False, False, 0, known.live
        while passes < max_passes and known.live and (reads or known.runs or known.waits or known.drafts):
            run_pass()
            passes += 1
            schedule.since += 1
            self.notes.add()
            if passes > 1:
                known = self._learn()  # the pass before the one that is under way
                ended |= known.live < live
            waits = known.waits and not reads
            pending = bool(waits or known.soonest <= 1 or (reads and self.work.in_use["at_one"]))
            # Lanes that leave in the pass that is under way are not in the next one.
            running, idle = known.runs - known.leaving, not reads and known.latest <= 1
            reads = schedule.due(pending, running, forced=idle)
            reads |= (wide or known.drafts > 0) and schedule.drafts_due(forced=idle)
            if reads:
                read_out()
            if self.is_over(ended):
                break
        while len(self.notes):
            known = self._learn()
            ended |= known.live < live
        if reads:  # no pass has noted the last one
            self._count_reads(self.notes.now())
        return TickReport(passes if known.live else max_passes, ended)

    def _learn(self) -> Note:
        """The note of the oldest pass that is not known yet."""
        note = self.notes.next()
        self._count_reads(note)
        if note.ran:  # a pass may start before the host knows that no lane is left
            self.counts.passes[note.ran] += 1
            self.schedule.note(1, note.ran, note.exits)
        return note

    def _count_reads(self, note: Note) -> None:
        if note.read:
            self.counts.reads[note.read] += 1

    # ---- the recorded functions -----------------------------------------------------------------------------------
    def _replay(self, key: tuple[Any, ...], mix: Mix) -> Callable[[], Any]:
        """The replay of the function key[0] of key[1] rows, recorded for a `mix` when first asked for."""
        every = self.graph.every[: key[1]]
        run = partial(self._pass, every, key[3]) if key[0] == "pass" else partial(self._read_out, every, key[2])
        if key in self.replays:
            return self.cache.get(self.replays, key, key[1], lambda: None)
        self.graph.real.fill_(False)
        # A read-out prepares the memory of exit rules for the positions that start, whether one needs it or not.
        with self._mixed(mix if key[0] == "pass" else mix._replace(exits=True)):
            replay = self.cache.get(self.replays, key, key[1], run)
        self.graph.real.fill_(True)
        return replay

    def _pass(self, every: Tensor, crowded: bool) -> None:
        """A pass of `every` [N] row."""
        forward, fills = self.forward, self.state.policy.fills
        if crowded:
            keep_order(self.graph, min(len(every), self.state.config.max_lanes or len(every)))
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

    def _read_out(self, every: Tensor, starts: int) -> None:
        """A read-out of `every` [N] row. `starts`: rows that may start a position, where there are waves; else 0."""
        which, real, row, position, s = self.steps.fetch(self.graph, every)
        logits, best = self.forward.head(self.forward.read_out(s, row, position, real))
        tokens = self.context.sampler(logits, best, row, position + 1)
        if self.work.in_use["logprobs"]:
            self.context.logprobs.note(logits, with_known(self.state, row, position, tokens), row, position)
        if starts:
            started = self.steps.advance(self.graph, which, row, position, tokens, self.graph.every[:starts])
        else:
            started = self.steps.emit(self.graph, which, real, row, position, tokens)
        where, there, row, position, tokens = started
        self.context.start(partial(self.steps.start, self.graph), where, row, position, tokens, only=there)
