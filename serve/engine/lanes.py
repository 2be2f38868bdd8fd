"""State of requests and lanes: dense tensors on the device, so that a tick does no Python for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .diffusion import NEVER, Diffusion

MAX_STOPS = 16


@dataclass
class Request:
    """What a request asks of the engine.

    `limit` is its R, `minimum` the recurrences before its rule may fire, `rule` one of exits.RULES with its
    `threshold`; `prompt_exit` lets the rule end prompt positions, too. `trace` gives depths of positions 0, 1, ... that
    are forced: what an earlier run recorded. `remaining` tokens may be generated; a token of `stops` is the last.
    A `fenced` request has every token sampled by the caller, between steps. `wave` positions of it may be in flight,
    which are exact, or refined by `diffusion`. Of a `shown` one, the loop's reader gets what the head reads at every
    prompt position. `sampling`: how its tokens are sampled: "argmax", "drawn" on the device, or drawn and "cut" there,
    or by what the "host" must look at; `penalised`: by logits that depend on the tokens before.
    """

    limit: int
    minimum: int = 1
    rule: str = "fixed"
    threshold: float = 0.0
    prompt_exit: bool = False
    trace: list[int] = field(default_factory=list)
    remaining: int = 1 << 40
    stops: tuple[int, ...] = ()
    fenced: bool = False
    wave: int = 1
    diffusion: Diffusion | None = None
    shown: bool = False
    sampling: str = "host"
    penalised: bool = False


class Requests:
    """One row for each of `rows` resident requests, and a spare one, of what only fills a pass up."""

    def __init__(self, rows: int, length: int, blocks: int, room: int, device: torch.device):
        self.rows, rows = rows, rows + 1

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.length = length
        self.table = zeros(rows, blocks, dtype=torch.int32)
        self.limit, self.minimum, self.rule = zeros(rows), zeros(rows), zeros(rows)
        self.threshold = zeros(rows, dtype=torch.float32)
        self.trace = zeros(rows, length + 1, dtype=torch.int32)  # forced depths, then those that happened; 0: neither
        self.remaining = zeros(rows)
        self.wave, self.frontier = zeros(rows), zeros(rows)  # frontier: the position whose token comes next
        self.refines, self.phase = zeros(rows, dtype=torch.bool), zeros(rows)  # diffusion, and where its step is
        self.ticks, self.items = zeros(rows), zeros(rows)  # passes since its prompt, and lanes in them
        self.stops = zeros(rows, MAX_STOPS)
        self.fenced, self.shown, self.samples, self.live, self.wild = (zeros(rows, dtype=torch.bool) for _ in range(5))
        # samples: does not take the likeliest token; wild: has had states that are not finite
        self.limit[-1] = NEVER
        self.script = zeros(rows, length + 1, dtype=torch.int32)  # tokens known beforehand, plus one; 0: to be sampled
        self.tokens, self.count = zeros(rows, room), zeros(rows)  # of this step
        self.depths = zeros(rows, room)  # recurrences of the position that gave each of these tokens

    def admit(self, row: int, request: Request, rule: int) -> None:
        self.limit[row], self.minimum[row], self.rule[row] = request.limit, request.minimum, rule
        self.threshold[row] = request.threshold
        self.trace[row], self.script[row] = 0, 0
        trace = torch.tensor(request.trace[: self.length], dtype=torch.int32)  # more positions than that do not come
        self.trace[row, : len(trace)] = trace
        self.remaining[row], self.wave[row], self.frontier[row] = request.remaining, request.wave, -1
        self.ticks[row], self.items[row] = 0, 0
        self.refines[row], self.phase[row] = request.diffusion is not None, 0
        if len(request.stops) > MAX_STOPS:
            raise ValueError(f"{len(request.stops)} stop tokens: at most {MAX_STOPS}")
        self.stops[row] = -1
        self.stops[row, : len(request.stops)] = torch.tensor(request.stops, dtype=torch.long)
        self.fenced[row], self.shown[row] = request.fenced, request.shown
        self.samples[row] = request.sampling != "argmax" or request.penalised
        self.live[row] = self.wild[row] = False


class Lanes:
    """Places for positions in flight. The first `rows * ring` belong to the rows, `ring` each; then come prompts'; the
    last one, `spare`, is the spare row's, and never leaves."""

    def __init__(self, rows: int, ring: int, prompts: int, width: int, dtype: torch.dtype, device: torch.device):
        self.ring, self.own, self.spare = ring, rows * ring, rows * ring + prompts
        count = self.spare + 1
        whole = torch.zeros(9, count, dtype=torch.long, device=device)
        self.row, self.position, self.depth, self.target, self.free, self.token, self.guess, self.left, self.stable = (
            line.clone() for line in whole
        )
        # target: recurrences at which it leaves, if no rule (`free` is 1) ends it before; token: what it started from;
        # guess: what it says comes next, or -1, of waves and diffusion; left: recurrences at the exit; stable: of
        # diffusion, steps with an unchanged token
        self.s = torch.zeros(count, width, dtype=dtype, device=device)
        self.e, self.read = torch.zeros_like(self.s), torch.zeros_like(self.s)  # input; state that is to be read out
        self.change = torch.zeros_like(self.s)  # of diffusion: what the last step changed of s
        self.running, self.emits, self.open, self.waiting, self.exited = (line.clone() for line in whole[:5].bool())
        self.row[self.spare], self.target[self.spare] = rows, NEVER
        # running: takes part in ticks; emits: a token comes of it; open: its token is not out yet; waiting: is not read
        # out yet; exited: has left, though it may run on for the sake of its keys and values

    def begin(
        self,
        where: torch.Tensor,
        row: torch.Tensor,
        position: torch.Tensor,
        target: torch.Tensor,
        free: torch.Tensor,
        token: torch.Tensor,
    ) -> None:
        """Start lanes `where` [m] with what is said of each [m]."""
        zero = torch.zeros_like(where)
        names = ("row", "position", "depth", "target", "free", "token", "guess")
        for name, values in zip(names, (row, position, zero, target, free, token, zero - 1), strict=True):
            getattr(self, name).index_put_((where,), values)
        for flag in (self.running, self.emits, self.open):
            flag.index_put_((where,), zero == 0)
        for flag in (self.waiting, self.exited):
            flag.index_put_((where,), zero > 0)

    def of_live(self, flag: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """The rows' own lanes [n] that have a flag, of rows that are `live`."""
        return self.own_of_live(flag, live).nonzero().squeeze(1)

    def own_of_live(self, flag: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
        """Whether each of the rows' own lanes has a flag, and a row that is `live`."""
        return (flag[: self.own].view(-1, self.ring) & live[:-1, None]).view(-1)

    def of(self, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The row's own lane for a position."""
        return row * self.ring + position % self.ring

    def span(self, row: int, first: int, last: int) -> torch.Tensor:
        """The row's own lanes for positions `first` to `last` (excluded)."""
        return row * self.ring + torch.arange(first, last, device=self.row.device) % self.ring
