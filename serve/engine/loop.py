"""The engine's loop: ticks over all lanes, exits, read-outs, and successors that start in the same step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .attention import Attention, Rows
from .exits import NUMBER, RULES, ExitRules, Readings
from .kv import KVPolicy
from .lanes import Lanes, Request, Requests
from .parts import Parts, read_out, recur, start

# (logits [m, V], rows [m], positions [m] of the tokens) -> tokens [m]
Sampler = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Prompt(NamedTuple):
    """`tokens` [n] of positions `first`, `first` + 1, ... of a row; `ends`: one is to be sampled after the last."""

    row: int
    tokens: torch.Tensor
    first: int
    ends: bool


class Chunk(NamedTuple):
    """Prompt lanes `first` to `last` of a row, in order."""

    row: int
    first: int
    last: int


@dataclass
class Counts:
    """What was done: `passes` of the core over `items` lanes, `reads` of the coda over `read` of them."""

    passes: int = 0
    items: int = 0
    reads: int = 0
    read: int = 0


class Loop:
    """All resident requests at once. `rows` requests of up to `length` positions, with `prompt_lanes` for prompt tokens
    in flight; a step has `ticks`; exits wait for `coda_batch` of them, at most `coda_age` ticks.

    The caller keeps `requests.table` (block tables) right, with room for `ticks` more positions of every live row.
    """

    def __init__(
        self,
        parts: Parts,
        attention: Attention,
        policy: KVPolicy,
        sampler: Sampler,
        *,
        rows: int,
        length: int,
        blocks: int,
        prompt_lanes: int,
        ticks: int,
        like: torch.Tensor,
        width: int = 0,
        coda_batch: int = 1,
        coda_age: int = 4,
    ):
        """`like` gives dtype and device of states. `width`: lanes of a pass beside prompts', 0 for no bound.
        Raises ValueError where one request's lanes alone exceed it."""
        ring = policy.depths if policy.complete else 1
        if width and width < ring:
            raise ValueError(f"width={width}: kv_policy={policy.name} can have {ring} lanes a request in flight")
        self.parts, self.attention, self.policy, self.sampler = parts, attention, policy, sampler
        self.ticks, self.width, self.coda_batch, self.coda_age = ticks, width, coda_batch, coda_age
        self.device = like.device
        hidden = parts.config.hidden_size
        self.requests = Requests(rows, length, blocks, ticks + policy.depths + 1, self.device)
        self.lanes = Lanes(rows, ring, prompt_lanes, hidden, like.dtype, self.device)
        self.rules = ExitRules(len(self.lanes.row), parts.config.vocab_size, self.device)
        self.rule_of: dict[int, str] = {}  # by row
        self.prompt_exit: dict[int, bool] = {}
        self.in_use: Counter[str] = Counter()
        self.chunks: list[Chunk] = []
        self.parked: list[tuple[torch.Tensor, torch.Tensor]] = []  # lanes of fenced rows, and what the head reads
        self.waited, self.turn = 0, 0  # ticks that an exit has waited; first row of the next pass, where not all fit
        self.keeps_input = parts.config.injection != "none"
        self.counts = Counts()

    # ---- requests -----------------------------------------------------------------------------------------------
    def admit(self, row: int, request: Request) -> None:
        """Give `row` to a request; `prompt` brings its tokens."""
        rule = request.rule if request.limit > request.minimum else "fixed"
        self.requests.admit(row, request, NUMBER[rule])
        self.in_use[rule] += 1
        self.rule_of[row], self.prompt_exit[row] = rule, request.prompt_exit

    def release(self, row: int) -> torch.Tensor:
        """Take the row back. Returns the depths that its positions had, for `Request.trace`."""
        lanes = self.lanes
        own = [(row * lanes.ring, (row + 1) * lanes.ring)]
        for first, last in own + [(chunk.first, chunk.last) for chunk in self.chunks if chunk.row == row]:
            lanes.running[first:last] = lanes.waiting[first:last] = False
        self.chunks = [chunk for chunk in self.chunks if chunk.row != row]
        self.requests.live[row] = False
        self.in_use[self.rule_of.pop(row)] -= 1
        self.in_use = +self.in_use
        return self.requests.trace[row].clone()

    def prompt(self, prompts: list[Prompt]) -> None:
        """Bring prompt tokens into lanes, where they run in the next step, to its end. Raises ValueError where there
        are not enough lanes."""
        lanes = self.lanes
        sizes = [len(prompt.tokens) for prompt in prompts]
        end = lanes.own + sum(sizes)
        if self.chunks or end > len(lanes.row):
            raise ValueError(f"{sum(sizes)} prompt tokens: there are {len(lanes.row) - lanes.own} lanes for a step's")
        row = torch.tensor([prompt.row for prompt in prompts]).repeat_interleave(torch.tensor(sizes)).to(self.device)
        position = torch.cat([torch.arange(p.first, p.first + n) for p, n in zip(prompts, sizes, strict=True)])
        tokens = torch.cat([prompt.tokens for prompt in prompts]).to(self.device)
        may_exit = torch.tensor([self.prompt_exit[p.row] for p in prompts]).repeat_interleave(torch.tensor(sizes))
        where = torch.arange(lanes.own, end, device=self.device)
        self._begin(where, row, position.to(self.device), tokens, may_exit.to(self.device))
        lanes.emits[where] = False
        first = lanes.own
        for prompt, size in zip(prompts, sizes, strict=True):
            self.chunks.append(Chunk(prompt.row, first, first + size))
            first += size
            lanes.emits[first - 1] = prompt.ends

    # ---- a step -------------------------------------------------------------------------------------------------
    def step(self, live: torch.Tensor) -> None:
        """Run ticks with the rows `live` [m] (others pause), until all prompts of this step are through and `ticks` are
        over, or nothing is left to do. What came of it: `requests.tokens`, `.depths` and `.count` of each row."""
        requests = self.requests
        requests.count.zero_()
        requests.live.zero_()
        requests.live[live] = requests.remaining[live] > 0
        tick = 0
        while (tick < self.ticks or self.chunks) and self.tick():
            tick += 1

    def tick(self) -> bool:
        """One core pass and what follows from it. Returns whether there was anything to do."""
        lanes = self._runnable()
        if len(lanes):
            self._recur(lanes)
        waiting = self._ready(idle=not len(lanes))
        if len(waiting):
            self._read_out(waiting)
        return bool(len(lanes) or len(waiting))

    def resume(self, sampler: Sampler) -> None:
        """Sample for the fenced rows that exited in this step; their next positions run in the next one."""
        for which, x in self.parked:
            self._sample(which, x, sampler)
        self.parked = []

    # ---- a tick -------------------------------------------------------------------------------------------------
    def _runnable(self) -> torch.Tensor:
        lanes = self.lanes
        which = (lanes.running & self.requests.live[lanes.row]).nonzero().squeeze(1)
        if not self.width or len(which) <= self.width:
            return which
        own = which[which < lanes.own]
        rows = len(self.requests.limit)
        turn = (lanes.row[own] - self.turn) % rows  # whole rows, so that no position overtakes the one before it
        served = torch.bincount(turn, minlength=rows).cumsum(0) <= self.width
        if not bool(served.all()):
            self.turn = (self.turn + int(served.long().argmin())) % rows
        return torch.cat([own[served[turn]], which[which >= lanes.own]])

    def _recur(self, which: torch.Tensor) -> None:
        lanes, requests, policy = self.lanes, self.requests, self.policy
        row, position, depth = lanes.row[which], lanes.position[which], lanes.depth[which]
        plan = self.attention.plan(Rows(requests.table, row, position, policy.slot(depth), policy.writes(depth)))
        before = lanes.s[which]
        after = recur(self.parts, before, lanes.e[which] if self.keeps_input else before, position, depth)
        depth = depth + 1
        lanes.s[which], lanes.depth[which] = after, depth
        self.counts.passes += 1
        self.counts.items += len(which)

        limit, target = requests.limit[row], lanes.target[which]
        over = depth >= limit
        leaves = over | ((target > 0) & (depth >= target))
        rules = {rule for rule in self.in_use if RULES[rule].reads != "nothing"}
        if rules:
            free = (target == 0) & ~lanes.exited[which]
            rule = torch.where(free, requests.rule[row], NUMBER["fixed"])
            readings = Readings(
                before,
                after,
                lambda some: self.parts.gate(after[some]),
                lambda some: self.parts.logits(self._coda(after[some], row[some], position[some])),
            )
            converged = self.rules.check(rules, which, rule, requests.threshold[row], readings)
            leaves |= converged & (depth >= requests.minimum[row])
        lanes.running[which] = ~over if policy.complete else ~leaves
        out = (leaves & ~lanes.exited[which]).nonzero().squeeze(1)
        if not len(out):
            return
        gone = which[out]
        lanes.read[gone], lanes.waiting[gone], lanes.exited[gone] = after[out], True, True
        requests.trace[row[out], position[out]] = depth[out].int()
        empty = policy.empty(depth[out], limit[out])
        if bool(empty.any()):
            self.attention.fill(plan, out, empty)

    def _ready(self, idle: bool) -> torch.Tensor:
        """Lanes to be read out now: prompts that are through, and, when enough of them wait, the others."""
        lanes = self.lanes
        done = [chunk for chunk in self.chunks if not bool(lanes.running[chunk.first : chunk.last].any())]
        waiting = lanes.waiting[: lanes.own]
        which = (waiting & self.requests.live[lanes.row[: lanes.own]]).nonzero().squeeze(1)
        if not done and not idle and len(which) < self.coda_batch and self.waited < self.coda_age:
            self.waited += bool(len(which))
            return which[:0]
        self.waited = 0
        self.chunks = [chunk for chunk in self.chunks if chunk not in done]
        return torch.cat([which, *(torch.arange(c.first, c.last, device=self.device) for c in done)])

    def _coda(self, s: torch.Tensor, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        if self.parts.config.coda:
            self.attention.plan(Rows(self.requests.table, row, position, torch.zeros_like(row)))
        return read_out(self.parts, s, position)

    def _read_out(self, which: torch.Tensor) -> None:
        lanes = self.lanes
        lanes.waiting[which] = False
        if not self.parts.config.coda:  # which has keys and values of every position
            which = which[lanes.emits[which]]
            if not len(which):
                return
        x = self._coda(lanes.read[which], lanes.row[which], lanes.position[which])
        self.counts.reads += 1
        self.counts.read += len(which)
        emits = lanes.emits[which]
        which, x = which[emits], x[emits]
        fenced = self.requests.fenced[lanes.row[which]]
        if bool(fenced.any()):
            self.parked.append((which[fenced], x[fenced]))
            which, x = which[~fenced], x[~fenced]
        if len(which):
            self._sample(which, x, self.sampler)

    def _sample(self, which: torch.Tensor, x: torch.Tensor, sampler: Sampler) -> None:
        """Tokens that come of lanes `which` [m], whose read-out is x [m, D], and the positions that they start."""
        lanes, requests = self.lanes, self.requests
        row, position = lanes.row[which], lanes.position[which] + 1
        known = requests.script[row, position].long()
        tokens = torch.where(known > 0, known - 1, sampler(self.parts.logits(x), row, position))
        count = requests.count[row]
        requests.tokens[row, count], requests.depths[row, count] = tokens, requests.trace[row, position - 1].long()
        requests.count[row] = count + (known == 0)
        requests.remaining[row] -= (known == 0).long()
        stopped = (requests.stops[row] == tokens[:, None]).any(1) & (known == 0)
        stopped |= (requests.remaining[row] <= 0) | (position >= requests.length)
        requests.remaining[row] = torch.where(stopped, 0, requests.remaining[row])
        requests.live[row] = ~stopped
        row, position, tokens = row[~stopped], position[~stopped], tokens[~stopped]
        if len(row):
            self._begin(lanes.of(row, position), row, position, tokens)

    def _begin(
        self,
        where: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        tokens: torch.Tensor,
        may_exit: torch.Tensor | None = None,
    ) -> None:
        """Start tokens [m] at depth 0 in lanes `where` [m]. Those that may not exit ([m]) run to their request's limit,
        whatever its rule."""
        lanes, requests = self.lanes, self.requests
        x = self.parts.embed(tokens, position)
        if self.parts.config.prelude:
            self.attention.plan(Rows(requests.table, row, position, torch.zeros_like(row)))
            x = self.parts.layers("prelude", x, position, None)
        if self.keeps_input:
            lanes.e[where] = x
        lanes.s[where] = start(self.parts, x, position)
        lanes.row[where], lanes.position[where], lanes.depth[where] = row, position, 0
        forced = requests.trace[row, position].long()
        fixed = requests.rule[row] == NUMBER["fixed"]
        if may_exit is not None:
            fixed |= ~may_exit
        free = torch.where(fixed, requests.limit[row], 0)
        lanes.target[where] = torch.where(forced > 0, forced, free)
        lanes.running[where], lanes.emits[where] = True, True
        lanes.waiting[where], lanes.exited[where] = False, False
        self.rules.begin(where)
