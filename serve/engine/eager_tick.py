"""The eager tick: the host chooses the lanes of every pass, and sees which of them left before it goes on.

This file decodes plainly, one position of a request at a time; staggered_tick.py adds waves and diffusions.

Shapes: n lanes of a pass, m lanes that are read out, D hidden size, V vocabulary.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from . import transitions
from .attention.base import Rows
from .passes import Passes, through_of
from .request import NEVER
from .tick import Chunk, Parked, Reader, Sampler, TickContext, TickReport
from .transitions.steps import Steps


class EagerTick:
    """A Tick for plain decoding, with all samplers and rules."""

    def __init__(self, context: TickContext, steps: Steps, reader: Reader | None):
        self.context, self.steps, self.reader = context, steps, reader
        self.state, self.forward = context.state, context.forward
        self.rules, self.routing = context.rules, context.routing
        self.schedule, self.work, self.counts = context.schedule, context.work, context.counts
        self.passes = Passes(self.state, self.forward, self.counts)
        self.order: Tensor | None = None  # running decode lanes, chosen for the next pass; None: choose anew
        self.waits, self.runs, self.drafts = 0, 0, 0  # decode lanes, after the last pass; see `choose`
        self.unread = True  # a lane may wait to be read out
        self.ended, self.parked = False, list[Parked]()  # report of the running tick
        self.none = torch.empty(0, dtype=torch.long, device=self.state.device)  # no lanes

    @property
    def staggered(self) -> bool:
        """A row may have several positions in flight before its token."""
        return False

    def begin_step(self) -> None:
        """Lanes have changed since the last tick."""
        self.order, self.unread = None, True

    def run(self, max_passes: int) -> TickReport:
        """As Tick.run."""
        self.ended, self.parked = False, []
        which = self._choose()
        passes = self._recur(which, max_passes) if len(which) else 0
        through = through_of(self.work.chunks, self.state.lanes.running, self.forward)
        self.schedule.since += passes
        waiting = self._due(through, forced=bool(through) or not passes)
        if len(waiting):
            self.order = None
            self._read_out(waiting)
        return TickReport(passes or int(len(waiting) > 0), self.ended, tuple(through), tuple(self.parked))

    # ---- a pass ---------------------------------------------------------------------------------------------------
    def _choose(self) -> Tensor:
        """Lanes [n] of the next pass: decode lanes, then prompt lanes."""
        state, chunks = self.state, self.work.chunks
        if self.order is None:
            self.order, counts = self.steps.choose(state)
            self.waits, self.runs, self.drafts = counts.tolist()
        turns = 0 if self.staggered or state.policy.complete else state.config.max_lanes
        which = decodes = self.order[: min(self.runs, turns or self.runs)]
        if chunks:
            lanes, rest = state.lanes, slice(state.num_decode_lanes, chunks[-1].last)
            running = lanes.running[rest] & state.requests.live[lanes.row[rest]]
            which = torch.cat([decodes, running.nonzero().squeeze(1) + state.num_decode_lanes])
        width = self._width(decodes)
        if not width or len(decodes) <= width:
            return which
        return torch.cat([transitions.turns.nearest(state, decodes, width), which[len(decodes) :]])

    def _width(self, decodes: Tensor) -> int:
        """Most decode lanes of a pass that has lanes [n] to run; 0: no bound."""
        return self.state.config.max_lanes

    def _recur(self, which: Tensor, max_passes: int) -> int:
        """Run lanes `which` [n] to the first exit, in at most `max_passes`. Returns how many ran."""
        state, policy = self.state, self.state.policy
        row, position, depth, begun, limit, first, before, counts = self.steps.enter(state, which)
        until, early, longest = counts.tolist()
        looks = self.rules.in_use or self.routing or self.unread  # lanes are looked at after every pass
        passes = 1 if looks else min(until, max_passes, self._until_read())
        place, slots = position, self._slots(which, row, depth)
        if self.routing:
            place, longest = self.routing.places(row, position, depth), 0
        alone = not (self.work.chunks or self.work.in_use["diffusion"])  # else no two lanes of a row have one slot
        e = state.lanes.e.index_select(0, which) if state.keeps_input else None
        mixed = self.passes.mixed(which, bool(self.work.chunks))
        fills = policy.fills and (bool(self.rules.in_use) or (early > 0 and passes == until))
        after, plans = before, []
        for left in range(passes - 1, -1, -1):
            if plans:
                begun, depth, slots, before = torch.ones_like(begun), depth + 1, slots + 1, after
            moved = (plans[0], policy.step) if len(plans) == 1 and policy.step is not None else None
            slot, writes = policy.slot(slots), policy.writes(slots)
            table = state.requests.block_table
            rows = Rows(table, row, place, slot, writes, alone, fills and not left, moved, longest)
            plans, after = self.passes(rows, mixed, before, before if e is None else e, position, begun, limit, slots)
        leaves = first if passes == until else torch.zeros_like(first)
        if self.routing:
            after, leaves = self.routing.combine(state, which, depth, before, after)
        if self.rules.in_use:
            leaves = leaves | self.rules.converged(which, row, position, depth, before, after)
        counts, empty, self.order = self.steps.settle(state, which, row, position, depth, after, leaves)
        exits, empties, self.waits, self.runs, self.drafts = counts.tolist()
        self.unread |= self.waits + self.drafts > 0
        self.schedule.note(passes, passes * len(which), exits, prompts=bool(self.work.chunks))
        if exits and self.routing:
            gone = which[leaves]
            transitions.routers.set_exit_depth(state, gone, self.routing.recurrences(gone, state.lanes.depth[gone]))
        if empties:
            self.passes.fill(plans, empty, mixed, empties)
        return passes

    def _slots(self, which: Tensor, row: Tensor, depth: Tensor) -> Tensor:
        """The recurrence [n] whose KV slot and LoRA each lane uses."""
        return depth

    def _until_read(self) -> int:
        """Passes until lanes are looked at, although none has left."""
        return NEVER

    # ---- a read-out -----------------------------------------------------------------------------------------------
    def _due(self, through: list[Chunk], forced: bool) -> Tensor:
        """Lanes [m] to be read out now: prompts that are through, and, when enough of them wait, the others."""
        state = self.state
        if not self.unread and not self.work.chunks:
            return self.none
        if not self.waits:
            self.schedule.reset()
        runs = 0 if self.work.in_use["diffusion"] else self.runs  # passes with its lanes, which never leave, stay full
        exits = self.waits and self.schedule.due(True, runs, forced=forced, more_within=self._more_within)
        if (self.waits or self.drafts) and not exits and not (self.drafts and self.schedule.drafts_due(forced)):
            return self.none
        self.unread = False
        which = transitions.drafts.due(state).nonzero().squeeze(1)
        prompts = [torch.arange(chunk.first, chunk.last, device=state.device) for chunk in through]
        return torch.cat([which, *prompts]) if through else which

    def _more_within(self, passes: int) -> bool:
        """Another lane may leave within so many passes; a lane with a rule may at any time."""
        lanes = self.state.lanes
        which = self.state.live_lanes(lanes.running & ~lanes.exited)
        return bool(((lanes.may_exit[which] > 0) | (lanes.exit_at[which] - lanes.depth[which] <= passes)).any())

    def _read_out(self, which: Tensor) -> None:
        """Read out lanes `which` [m], prompts' at the end: coda, head, tokens, next positions."""
        state, lanes = self.state, self.state.lanes
        prompts = int(which[-1]) >= state.num_decode_lanes
        if prompts and not self.forward.parts.config.coda:  # a coda has keys and values of every position
            transitions.windows.stop_waiting(state, which)
            which = which[lanes.wants_token[which] | self._for_reader(which)]
        if self.staggered:  # the coda wants a row's positions in order
            which = which[(lanes.row[which] * (state.config.max_model_len + 2) + lanes.position[which]).argsort()]
        if not len(which):
            return
        s, row, position = self.steps.fetch(state, which)
        read = Parked(which, row, position, self.forward.read_out(s, row, position))
        self.counts.reads[len(which)] += 1
        if prompts:
            shown = self._for_reader(which)
            if self.reader is not None and bool(shown.any()):
                self.reader(read.x[shown], row[shown], position[shown])
            wants_token = lanes.wants_token[which]
            read = Parked(*(each[wants_token] for each in read))
        if self.work.in_use["sampled_by_host"]:
            by_host = state.requests.sampled_by_host[read.row]
            if bool(by_host.any()):
                self.parked.append(Parked(*(each[by_host] for each in read)))
                read = Parked(*(each[~by_host] for each in read))
        if len(read.which):
            self.sample(self.context.sampler, read)

    def _for_reader(self, which: Tensor) -> Tensor:
        """[m]: the lane is a prompt position whose read-out the reader gets."""
        state = self.state
        return state.requests.wants_prompt_logits[state.lanes.row[which]] & (which >= state.num_decode_lanes)

    def sample(self, sampler: Sampler, read: Parked) -> None:
        """Sample the tokens that follow lanes [m], put them out, and start the positions after them."""
        parts = zip(*(part.split(self.state.config.most_read) for part in read[1:]), strict=True)
        tokens = torch.cat([self._tokens(sampler, *part) for part in parts])
        self._emit(*read[:3], tokens)

    def _tokens(self, sampler: Sampler, row: Tensor, position: Tensor, x: Tensor) -> Tensor:
        """The tokens [m] that follow positions [m] of rows [m], by the head's input x [m, D]."""
        state, in_use, following = self.state, self.work.in_use, position + 1
        logits, tokens = self.forward.head(x)
        if any(in_use[name] for name in ("drawn", "cut", "penalised", "host")):
            some = state.requests.samples[row].nonzero().squeeze(1)
            if len(some):
                tokens[some] = sampler(logits[some], tokens[some], row[some], following[some])
        if in_use["known_tokens"]:
            known = state.requests.known_tokens[row, following].long()
            tokens = torch.where(known > 0, known - 1, tokens)
        if in_use["logprobs"]:
            self.context.logprobs.note(logits, tokens, row, position)
        return tokens

    def _emit(self, which: Tensor, row: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Put out tokens [m] of lanes `which` [m], one a row at most, and start them."""
        position, stopped = self.steps.emit(self.state, which, row, position, tokens)
        if bool(stopped.any()):
            self.ended = True
            row, position, tokens = row[~stopped], position[~stopped], tokens[~stopped]
        self._start(row, position, tokens)

    def _start(self, row: Tensor, position: Tensor, tokens: Tensor) -> None:
        """Start tokens [m] of rows at positions [m] in their decode lanes."""
        state = self.state
        if not len(row):
            return
        step, where = partial(self.steps.start, state), state.lane_of(row, position)
        order, counts = self.context.start(step, where, row, position, tokens)
        self.waits, self.runs, self.drafts = counts.tolist()
        self.unread |= self.routing is not None  # a router may end some at once
        self.order = None if self.routing or self.staggered else order
