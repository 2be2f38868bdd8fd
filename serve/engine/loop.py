"""The engine's loop: ticks over all lanes, exits, read-outs, and successors that start in the same step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from . import diffusion, passes
from .admission import refusal, too_narrow
from .attention import Attention, Rows
from .compiled import ALONE, compiled
from .costs import Costs
from .diffusion import Diffusion, Wave, refine
from .exits import NUMBER, RULES, ExitRules
from .graphs import Graphs
from .kv import KVPolicy
from .lanes import Lanes, Request, Requests
from .masked import Masked
from .parts import Parts, embed, head, logits, recur, recur_alike, start
from .readout import Reader, Sampler, coda, read, ready, sample
from .routing import Routing
from .tick import STEPS, Steps
from .wave import speculative


class Prompt(NamedTuple):
    """`tokens` [n] of positions `first`, `first` + 1, ... of a row; `ends`: one is to be sampled after the last. From
    position `generated` on an earlier run sampled them, so the request's rule ends them, where no trace does."""

    row: int
    tokens: torch.Tensor
    first: int
    ends: bool
    generated: int = 1 << 40


class Chunk(NamedTuple):
    """Prompt lanes `first` to `last` of a row, in order."""

    row: int
    first: int
    last: int


@dataclass
class Counts:
    """What was done: how many `passes` of the core, and `reads` of the coda and the head, had n lanes."""

    passes: Counter[int] = field(default_factory=Counter)
    reads: Counter[int] = field(default_factory=Counter)


class Loop:
    """All resident requests at once. `rows` requests of up to `length` positions, with `prompt_lanes` for prompt tokens
    in flight; a step has `ticks`. An exit waits at most `coda_wait` ticks for others that are read out with it; with
    `costs` (an attribute), as many as the load makes worth while. With `graphs` (an attribute), passes that fit them
    are replayed.

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
        coda_wait: int = 0,
        wave: int = 1,
        reader: Reader | None = None,
        compile: bool = False,
    ):
        """`like` gives dtype and device of states. `width`: lanes of a pass beside prompts', 0 for no bound; those
        nearest to their token go first. `wave`: most positions that one request may have in flight before its token;
        waves may fill a pass up to `budget` lanes (an attribute; 0 for no bound), certain positions always run.
        `reader` gets the prompts of requests that are `shown`. `compile`: `warm_up` compiles the core, if `parts` can
        be.
        Raises ValueError where one request's lanes alone exceed the width."""
        ring = (policy.depths if policy.complete else 1) + wave - 1
        if reason := too_narrow(width, policy):
            raise ValueError(reason)
        self.parts, self.attention, self.policy, self.sampler = parts, attention, policy, sampler
        whole = (recur, recur_alike, embed, logits, head)
        self.recur, self.recur_alike, self.embed, self.logits, self.head = (
            map(compiled, whole) if compile and parts.compilable else whole
        )
        self.steps = Steps(*(compiled(step, **ALONE) for step in STEPS)) if compile else STEPS
        self.relaxed = bool((parts.config.relaxation or {}).get("rank"))
        self.wave, self.budget = wave, 0
        self.costs: Costs | None = None
        self.graphs: Graphs | None = None
        self.masked: Masked | None = None
        self.load = [0.0, 0.0, 0.0]  # of late: ticks, lanes in them, exits
        self.diffusions: dict[int, Diffusion] = {}  # by row
        self.waves: dict[int, Wave] = {}
        self.reader = reader
        self.ticks, self.width, self.coda_wait = ticks, width, coda_wait
        self.device = like.device
        hidden = parts.config.hidden_size
        room = (ticks + policy.depths + 1) * wave  # tokens of a step: each tick puts out a whole wave at most
        self.requests = Requests(rows, length, blocks, room, self.device)
        self.lanes = Lanes(rows, ring, prompt_lanes, hidden, like.dtype, self.device)
        self.rules = ExitRules(self.lanes, wave == 1, parts.config.vocab_size)
        self.features: dict[int, set[str]] = {}  # by row: its rule, and what else not every request has
        self.in_use: Counter[str] = Counter()  # of all rows: what none has costs a tick nothing
        self.prompt_exit: dict[int, bool] = {}
        self.chunks: list[Chunk] = []
        self.parked: list[list[torch.Tensor]] = []  # of fenced rows: what `sample` gets
        self.none = torch.empty(0, dtype=torch.long, device=self.device)
        self.reading: set[str] = set()  # rules in use that read something
        self.never = torch.zeros(len(self.lanes.row), dtype=torch.bool, device=self.device)
        self.always = torch.ones(len(self.lanes.row), dtype=torch.bool, device=self.device)
        self.unread = True  # whether a lane may wait to be read out
        self.eager = False  # whether a step ends when a request does, as others wait for its place
        self.somebody_waits: Callable[[], bool] | None = None  # asked after every tick: whether the step is to end
        self.ended = False  # whether a request has ended in this step
        self.waits, self.runs = 0, 0  # rows' own lanes, after the last pass
        self.order: torch.Tensor | None = None  # those that run, chosen for the next one, unless lanes changed since
        self.turn = torch.zeros(2, dtype=torch.long, device=self.device)  # where passes without room for all begin
        self.waited = 0  # ticks that an exit has waited
        self.routing = Routing(self, parts.router) if parts.config.router else None
        self.keeps_input = parts.config.injection != "none"
        self.resident = 0  # requests of a step
        self.counts = Counts()

    @property
    def nbytes(self) -> int:
        """Of the state of lanes and requests, as it is before any of them has come."""
        holders = (self, self.requests, self.lanes, self.rules, self.routing)
        held = [part for holder in holders if holder for part in vars(holder).values()]
        return sum(part.nbytes for part in held if isinstance(part, torch.Tensor))

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Passes at the first position of block 0, so that what is compiled is compiled now."""
        lanes, steps, two = self.lanes, self.steps, torch.arange(2, device=self.device)
        s, at = lanes.s.new_zeros(3, lanes.s.shape[1]), torch.zeros(3, dtype=torch.long, device=self.device)
        fills = self.policy.fills
        plan = self.attention.plan(Rows(self.requests.table, at, at.clone(), at.clone(), at > 0, fills=fills))
        for function in (self.recur, self.recur_alike)[: 1 + self.relaxed]:
            function(self.parts, s, s.clone(), at.clone(), at > 0, at)
        if fills:  # two slots behind three rows, as lengths are to differ
            self.attention.fill(plan, torch.arange(3, device=self.device).clamp(max=1), 2)
        self.embed(self.parts, at, at.clone())
        self.logits(self.parts, s)
        self.head(self.parts, s)
        steps.choose(self)
        row, position, depth, begun, _, s, _ = steps.enter(self, two)
        steps.settle(self, two, row, position, depth, s, begun)
        steps.fetch(self, two)
        steps.emit(self, two, row, position, depth)
        steps.begin(self, two, row, position, depth, self.always[:2], s, s.clone())
        for flag in (lanes.running, lanes.emits, lanes.open, lanes.waiting, lanes.exited):
            flag.zero_()

    # ---- requests -----------------------------------------------------------------------------------------------
    def admit(self, row: int, request: Request) -> None:
        """Give `row` to a request; `prompt` brings its tokens. Raises ValueError for a wave or a diffusion that the
        model or its KV policy does not allow."""
        rule = request.rule if request.limit > request.minimum else "fixed"
        if reason := refusal(self, request):
            raise ValueError(reason)
        if request.diffusion:
            self.diffusions[row] = request.diffusion
        self.requests.admit(row, request, NUMBER[rule])
        if self.routing:
            self.routing.admit(row)
        others = {
            "wave": request.wave > 1,
            "fenced": request.fenced,
            "shown": request.shown,
            "penalised": request.penalised,
            "shallow": (request.minimum == 1 and (rule != "fixed" or request.limit == 1)) or bool(request.trace),
        }
        self.features[row] = {rule, request.sampling, *(name for name, has in others.items() if has)}
        self.in_use.update(self.features[row])
        self._count_rules()
        self.prompt_exit[row] = request.prompt_exit

    def script(self, row: int, start: int, tokens: torch.Tensor) -> None:
        """Tokens [n] of a row at positions `start` and after, which are known: they are not sampled, nor put out."""
        self.requests.script[row, start : start + len(tokens)] = tokens.int() + 1
        self.in_use["script"] += "script" not in self.features[row]
        self.features[row].add("script")

    def release(self, row: int) -> torch.Tensor:
        """Take the row back. Returns the depths that its positions had, for `Request.trace`."""
        lanes = self.lanes
        own = [(row * lanes.ring, (row + 1) * lanes.ring)]
        for first, last in own + [(chunk.first, chunk.last) for chunk in self.chunks if chunk.row == row]:
            lanes.running[first:last] = lanes.waiting[first:last] = lanes.open[first:last] = False
        self.chunks = [chunk for chunk in self.chunks if chunk.row != row]
        self.requests.live[row] = False
        if bool(self.requests.wild[row]):  # whoever gets its blocks weighs what it does not see by 0, and 0 NaN is NaN
            self.attention.clean(self.requests.table[row])
        self.diffusions.pop(row, None)
        self.waves.pop(row, None)
        self.in_use -= Counter(self.features.pop(row))
        self._count_rules()
        return self.requests.trace[row].clone()

    def _count_rules(self) -> None:
        self.reading = {rule for rule in self.in_use if rule in RULES and RULES[rule].reads != "nothing"}

    def prompt(self, prompts: list[Prompt]) -> None:
        """Bring prompt tokens into lanes, where they run in the next step, to its end. Raises ValueError where there
        are not enough lanes."""
        lanes, prompts = self.lanes, [self._held(prompt) for prompt in prompts]
        sizes = [len(prompt.tokens) for prompt in prompts]
        end = lanes.own + sum(sizes)
        if self.chunks or end > lanes.spare:
            raise ValueError(f"{sum(sizes)} prompt tokens: there are {lanes.spare - lanes.own} lanes for a step's")
        row = torch.tensor([prompt.row for prompt in prompts]).repeat_interleave(torch.tensor(sizes)).to(self.device)
        position = torch.cat([torch.arange(p.first, p.first + n) for p, n in zip(prompts, sizes, strict=True)])
        tokens = torch.cat([prompt.tokens for prompt in prompts]).to(self.device)
        may_exit = torch.tensor([self.prompt_exit[p.row] for p in prompts]).repeat_interleave(torch.tensor(sizes))
        may_exit |= position >= torch.tensor([p.generated for p in prompts]).repeat_interleave(torch.tensor(sizes))
        where = torch.arange(lanes.own, end, device=self.device)
        self._begin(where, row, position.to(self.device), tokens, may_exit.to(self.device))
        lanes.emits[where] = False
        first = lanes.own
        for prompt, size in zip(prompts, sizes, strict=True):
            self.chunks.append(Chunk(prompt.row, first, first + size))
            first += size
            lanes.emits[first - 1] = prompt.ends

    def _held(self, prompt: Prompt) -> Prompt:
        """Without the newest generated token, where its rule reads it through a coda, which has not got the positions
        before it until they are through: it follows them."""
        last = prompt.first + len(prompt.tokens) - 1
        rules = (RULES[name] for name in self.features[prompt.row] if name in RULES)
        reads = self.parts.config.coda and any(rule.reads == "logits" for rule in rules)
        if not reads or not prompt.ends or last < max(prompt.generated, prompt.first + 1):
            return prompt
        self.script(prompt.row, last, prompt.tokens[-1:].to(self.device))
        return prompt._replace(tokens=prompt.tokens[:-1])

    # ---- a step -------------------------------------------------------------------------------------------------
    def step(self, live: torch.Tensor) -> None:
        """Run ticks with the rows `live` [m] (others pause), until all prompts of this step are through and `ticks` are
        over, or the step is, or nothing is left to do. What came of it: `requests.tokens`, `.depths` and `.count` of
        each row."""
        requests = self.requests
        requests.count.zero_()
        requests.live.zero_()
        requests.live[live] = requests.remaining[live] > 0
        self.resident = len(live)
        self.unread, self.order = True, None
        self._weigh()
        self.ended, left = False, self.ticks
        while (left > 0 or self.chunks) and (done := self.tick(max(left, 1))):
            left = 0 if self.is_over() else left - done

    def is_over(self) -> bool:
        """Whether the step is to end before its ticks are over."""
        return (self.eager and self.ended) or (self.somebody_waits is not None and self.somebody_waits())

    def tick(self, most: int) -> int:
        """Passes of the core, `most` at most, until a lane leaves, and what follows from it. Returns how many; 1, too,
        where there was only something to read out; 0 where nothing is left to do."""
        if self.masked and self.masked.fits():
            return self.masked.run(most)
        lanes = passes.runnable(self)
        done = passes.run(self, lanes, most) if len(lanes) else 0
        waiting = ready(self, idle=not done)
        ahead = speculative(self) if self.in_use["wave"] else self.none
        if len(waiting) or len(ahead):
            self.order = None
            read(self, waiting, ahead)
        if self.waves:
            self._refine()
        return done or int(len(waiting) > 0)

    def _weigh(self) -> None:
        """How long exits wait in this step, by the load of the steps before."""
        ticks, lanes, exits = self.load
        if self.costs and exits:
            self.coda_wait = self.costs.patience(lanes / ticks, exits / ticks, lanes / exits)
        self.load = [part / 2 for part in self.load]

    def resume(self, sampler: Sampler) -> None:
        """Sample for the fenced rows that exited in this step; their next positions run in the next one."""
        for parked in self.parked:
            sample(self, sampler, *parked)
        self.parked = []

    # ---- a tick -------------------------------------------------------------------------------------------------
    @property
    def staggered(self) -> bool:
        """Whether rows may have several lanes in flight before their token: waves, or diffusions."""
        return bool(self.waves or self.in_use["wave"])

    def _refine(self) -> None:
        """Diffusions whose step is over go on to the next."""
        lanes, requests = self.lanes, self.requests
        rows = [row for row, wave in self.waves.items() if int(requests.phase[row]) == wave.of.inner]
        if not rows:
            return
        self.order = None
        which = torch.cat([lanes.span(row, self.waves[row].first, self.waves[row].last) for row in rows])
        row, position = lanes.row[which], lanes.position[which]
        self.counts.reads[len(which)] += 1
        said, best = self.head(self.parts, coda(self, lanes.s[which], row, position))
        refine(self, rows, self.sampler(said, best, row, position + 1))

    def put_out(self, which: torch.Tensor, row: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> None:
        """Put out tokens of lanes `which`, of rows at positions [m], one a row at most, and start them."""
        position, stopped = self.steps.emit(self, which, row, position, tokens)
        if bool(stopped.any()):
            self.ended = True
            row, position, tokens = row[~stopped], position[~stopped], tokens[~stopped]
        self.begin_next(row, position, tokens)

    def emit(self, which: torch.Tensor) -> None:
        """Put out the guesses of lanes `which` [m], one a row at most."""
        lanes = self.lanes
        self.steps.emit(self, which, lanes.row[which], lanes.position[which], lanes.guess[which])

    def begin_next(self, row: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor) -> None:
        """Start tokens [m] of rows in lanes of their own."""
        if self.diffusions:
            refined = self.requests.refines[row]
            for n in refined.nonzero().squeeze(1).tolist():
                diffusion.begin(self, int(row[n]), int(position[n]), tokens[n])
            row, position, tokens = row[~refined], position[~refined], tokens[~refined]
        if len(row):
            self._begin(self.lanes.of(row, position), row, position, tokens)

    def prelude(
        self, tokens: torch.Tensor, row: torch.Tensor, position: torch.Tensor, only: torch.Tensor | None = None
    ) -> torch.Tensor:
        """e [m, D] of tokens [m] of rows at positions [m]. `only` [m]: which of them there are; no two are of one row
        then."""
        x = self.embed(self.parts, tokens, position)
        if self.parts.config.prelude:
            rows = Rows(self.requests.table, row, position, torch.zeros_like(row), only, alone=only is not None)
            self.attention.plan(rows)
            x = self.parts.layers("prelude", x, position, None)
        return x

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
        x = self.prelude(tokens, row, position)
        may_exit = self.always[: len(where)] if may_exit is None else may_exit
        inputs = x, start(self.parts, x, position)
        order, counts = self.steps.begin(self, where, row, position, tokens, may_exit, *inputs)
        self.waits, self.runs = counts.tolist()
        if self.reading:
            self.rules.begin(where, self.reading)
        if self.routing:
            self.routing.begin(where)
        # A router may end some at once, and waves start more lanes than these.
        self.order = None if self.routing or self.staggered else order
