"""The engine's loop: requests come, their prompts run, steps of ticks generate tokens, requests go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from . import costs, transitions
from .admission import exact, features, refusal, too_narrow
from .attention.base import Attention
from .compile import ALONE, compiled
from .costs import Costs
from .decoders.cadence import Cadence
from .decoders.diffusion import Diffusion
from .exits import NUMBER, RULES, ExitRules
from .forward import Forward
from .graph_tick import GraphTick
from .graphs import GraphCache, Graphs, Record
from .kv import KVPolicy
from .logprobs import Logprobs
from .loop_config import MAX_ROWS, LoopConfig
from .parts import Parts
from .readout_schedule import ReadoutSchedule
from .request import NEVER, Request
from .routing import Routing
from .staggered_tick import StaggeredTick
from .state import State
from .tick import Chunk, Parked, Reader, Sampler, TickContext, TickReport
from .transitions.steps import STEPS, Steps
from .warm_up import warm_up


class Prompt(NamedTuple):
    """Tokens [n] of positions `first`, `first` + 1, ... of a row.

    wants_token: one is sampled after the last.   generated: from this position on, an earlier run sampled the tokens,
    so the request's rule ends their positions, where no depth is forced.
    """

    row: int
    tokens: Tensor
    first: int
    wants_token: bool
    generated: int = NEVER


class Loop:
    """All resident requests at once.

    The caller keeps block tables right (`set_block_tables`), with room for `passes_per_step` more positions of every
    live row.
    """

    def __init__(
        self,
        parts: Parts,
        attention: Attention,
        policy: KVPolicy,
        sampler: Sampler,
        config: LoopConfig,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        reader: Reader | None = None,
    ):
        """`dtype` is that of states. `reader` gets the prompts of requests that want prompt logits.

        Raises ValueError where the lanes of one request alone exceed `max_lanes`.
        """
        if reason := too_narrow(config.max_lanes, policy):
            raise ValueError(reason)
        self.config, model = config, parts.config
        self.state = state = State.create(config, policy, model, dtype, device)
        requests = state.requests
        self.forward = Forward(parts, attention, requests.block_table, requests.known_tokens.shape[1], config.compile)
        self.rules = ExitRules(state, self.forward)
        self.routing = Routing(parts.router, state) if parts.router is not None else None
        self.schedule = ReadoutSchedule(config.coda_wait, config.max_lanes)
        parts_of = self.forward, self.rules, self.routing, self.schedule
        self.context = TickContext(state, *parts_of, sampler, Logprobs(state, model.vocab_size))
        self.work, self.counts = self.context.work, self.context.counts
        self.steps = Steps(*(compiled(step, **ALONE) for step in STEPS)) if config.compile else STEPS
        self.cadence = Cadence(state, self.work, self.schedule)
        self.diffusion = Diffusion(state, self.forward)
        self.eager_tick = StaggeredTick(self.context, self.steps, reader, self.diffusion)
        self.graph_tick: GraphTick | None = None
        self.features: dict[int, set[str]] = {}  # by row: its rule, and whatever else not every request has
        self.prompt_exit: dict[int, bool] = {}  # by row
        self.parked: list[Parked] = []  # reads of rows whose tokens the caller samples
        self.eager = False  # a step ends when a request does, as others wait for its place
        self.somebody_waits: Callable[[], bool] | None = None  # asked after every tick: the step should end

    @property
    def nbytes(self) -> int:
        """Bytes of the state of lanes and requests, whatever they will ask for, before any of them has come."""
        return sum(part.nbytes for part in (self.state, self.rules, self.context.logprobs, self.routing) if part)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile everything that can be compiled now."""
        warm_up(self.state, self.forward, self.steps)
        if self.graph_tick:
            self.graph_tick.warm_up()

    def use_graphs(self, record: Record, max_rows: int = MAX_ROWS, ticks: bool = True) -> None:
        """Replay graphs by `record`: for passes of up to `max_rows` lanes, and for whole `ticks` where they fit."""
        cache = GraphCache(record)
        self.eager_tick.passes.graphs = Graphs(self.state, self.forward, cache, max_rows) if max_rows else None
        self.graph_tick = GraphTick(self.context, cache, self.is_over, self.config.compile) if ticks else None

    def measure(self, agree: Callable[[float], float] = lambda seconds: seconds) -> Costs:
        """Measure passes and read-outs by number of lanes (costs.measure). No request may be resident."""
        self.work.costs = costs.measure(self.state, self.forward, self.graph_tick and self.graph_tick.recorded, agree)
        return self.work.costs

    # ---- requests -------------------------------------------------------------------------------------------------
    def admit(self, row: int, request: Request, passes: int = 0, lane_passes: int = 0) -> None:
        """Give `row` to a request; `prompt` brings its tokens. `passes` and `lane_passes` were spent before a
        preemption.

        Raises ValueError for a decoder or an exit that the model, its KV policy or the request does not allow.
        """
        rule = request.rule if request.num_recurrences > request.min_recurrences else "fixed"
        if reason := refusal(request, self.state.policy, self.forward.parts.config, self.config.max_in_flight):
            raise ValueError(reason)
        request = exact(request, rule, self.forward.parts.config)
        transitions.requests.admit(self.state, row, request, NUMBER[rule], passes, lane_passes)
        if request.diffusion:
            self.diffusion.settings[row] = request.diffusion
        if self.routing:
            self.routing.admit(row)
        self.cadence.admit(row, request)
        self.features[row] = features(request, rule)
        self.work.in_use.update(self.features[row])
        self.rules.use(self.work.in_use)
        self.prompt_exit[row] = request.prompt_exit

    def set_block_tables(self, rows: Tensor, places: Tensor | slice, blocks: Tensor) -> None:
        """Rows [n] have KV `blocks` [n] at `places` [n] of their tables from now on, or [n, B] at a slice of them."""
        transitions.requests.set_block_table(self.state, rows, places, blocks)

    def set_known_tokens(self, row: int, first: int, tokens: Tensor) -> None:
        """Tokens [n] of a row, at positions `first` and after, are known: they are neither sampled nor put out."""
        transitions.requests.set_known_tokens(self.state, row, first, tokens)
        self.work.in_use["known_tokens"] += "known_tokens" not in self.features[row]
        self.features[row].add("known_tokens")

    def prompt(self, prompts: list[Prompt]) -> None:
        """Start prompt tokens in lanes; the next step runs them to their end.

        Raises ValueError where there are not enough lanes, or prompts of an earlier call have not run yet.
        """
        state, prompts = self.state, [self._without_newest(prompt) for prompt in prompts]
        sizes = [len(prompt.tokens) for prompt in prompts]
        first, end = state.num_decode_lanes, state.num_decode_lanes + sum(sizes)
        if self.work.chunks or end > state.spare:
            raise ValueError(f"{sum(sizes)} prompt tokens: there are {state.spare - first} lanes for a step's")

        def each(values: list[int]) -> Tensor:
            return torch.tensor(values).repeat_interleave(torch.tensor(sizes))

        position = torch.cat([torch.arange(p.first, p.first + n) for p, n in zip(prompts, sizes, strict=True)])
        may_exit = each([self.prompt_exit[p.row] for p in prompts]).bool() | (
            position >= each([p.generated for p in prompts])
        )
        tokens = torch.cat([prompt.tokens for prompt in prompts])
        row, where = each([prompt.row for prompt in prompts]), torch.arange(first, end)
        lanes = [part.to(state.device) for part in (where, row, position, tokens, may_exit)]
        self.context.start(partial(self.steps.start, state), *lanes)
        ends = torch.tensor(sizes).cumsum(0) + first
        wants_token = torch.tensor([prompt.wants_token for prompt in prompts])
        transitions.requests.start_prompts(state, lanes[0], (ends - 1).to(state.device), wants_token.to(state.device))
        for prompt, size, last in zip(prompts, sizes, ends.tolist(), strict=True):
            self.work.chunks.append(Chunk(prompt.row, last - size, last))

    def _without_newest(self, prompt: Prompt) -> Prompt:
        """Hold back the newest generated token, if its rule reads it through a coda: the coda lacks the positions
        before it until they are through. It follows them as a known token."""
        last = prompt.first + len(prompt.tokens) - 1
        rules = (RULES[name] for name in self.features[prompt.row] if name in RULES)
        reads = self.forward.parts.config.coda and any(rule.reads == "logits" for rule in rules)
        if not reads or not prompt.wants_token or last < max(prompt.generated, prompt.first + 1):
            return prompt
        self.set_known_tokens(prompt.row, last, prompt.tokens[-1:].to(self.state.device))
        return prompt._replace(tokens=prompt.tokens[:-1])

    def release(self, row: int) -> Tensor:
        """Take the row back, and stop its lanes. Cleans its KV blocks, if a state was not finite.

        Returns the depths [max_model_len + 1] of its positions, for `Request.forced_depths`.
        """
        requests, chunks = self.state.requests, self.work.chunks
        transitions.requests.release(
            self.state, row, [(chunk.first, chunk.last) for chunk in chunks if chunk.row == row]
        )
        self.work.chunks[:] = [chunk for chunk in chunks if chunk.row != row]
        if bool(requests.saw_nonfinite[row]):
            self.forward.attention.clean(requests.block_table[row])
        self.diffusion.release(row)
        self.work.in_use -= Counter(self.features.pop(row, ()))  # none: its admission failed
        self.cadence.release(row)
        self.rules.use(self.work.in_use)
        return requests.forced_depths[row].clone()

    # ---- a step ---------------------------------------------------------------------------------------------------
    def step(self, live: Tensor) -> None:
        """Run ticks with the rows `live` [m]; the others pause.

        It ends when all prompts of this step are through and `passes_per_step` passes have run, when `is_over`, or when
        nothing is left to do. `outputs` has the result.
        """
        transitions.requests.begin_step(self.state, live)
        self.work.resident = len(live)
        self.eager_tick.begin_step()
        self.schedule.begin_step(self.cadence.begin_step())
        ended, left = False, self.config.passes_per_step
        while left > 0 or self.work.chunks:
            report = self.tick(max(left, 1))
            if not report.passes:
                return
            self.work.chunks[:] = [chunk for chunk in self.work.chunks if chunk not in report.through]
            self.parked += report.parked
            ended |= report.ended
            left = 0 if self.is_over(ended) else left - report.passes

    def tick(self, max_passes: int) -> TickReport:
        """As Tick.run, by graphs where they fit."""
        if self.graph_tick and self.graph_tick.fits():
            report = self.graph_tick.run(max_passes)
            self.eager_tick.begin_step()
            return report
        return self.eager_tick.run(max_passes)

    def is_over(self, ended: bool) -> bool:
        """The step should end before its passes are over; `ended`: a request of it has."""
        return (self.eager and ended) or (self.somebody_waits is not None and self.somebody_waits())

    def resume(self, sampler: Sampler) -> None:
        """Sample for the rows that are sampled by the host and exited in this step; their next positions run in the
        next step."""
        while self.parked:
            self.eager_tick.sample(sampler, self.parked.pop(0))

    def outputs(self, rows: Tensor) -> tuple[list[list[int]], list[list[int]]]:
        """Tokens of this step for each of rows [m], and the recurrences that each of them took. Waits for the
        device."""
        requests = self.state.requests
        counts = requests.count[rows].tolist()
        most = max(counts, default=0)
        tokens, depths = requests.tokens[rows, :most].tolist(), requests.depths[rows, :most].tolist()
        for line, other, n in zip(tokens, depths, counts, strict=True):
            del line[n:], other[n:]
        return tokens, depths
