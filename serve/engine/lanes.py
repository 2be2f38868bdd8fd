"""State of requests and lanes: dense tensors on the device, so that a tick does no Python for each of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

MAX_STOPS = 16


@dataclass
class Request:
    """What a request asks of the engine.

    `limit` is its R, `minimum` the recurrences before its rule may fire, `rule` one of exits.RULES with its
    `threshold`; `prompt_exit` lets the rule end prompt positions, too. `trace` gives depths of positions 0, 1, ... that
    are forced: what an earlier run recorded. `remaining` tokens may be generated; a token of `stops` is the last.
    A `fenced` request has every token sampled by the caller, between steps.
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


class Requests:
    """One row for each resident request."""

    def __init__(self, rows: int, length: int, blocks: int, room: int, device: torch.device):
        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.length = length
        self.table = zeros(rows, blocks, dtype=torch.int32)
        self.limit, self.minimum, self.rule = zeros(rows), zeros(rows), zeros(rows)
        self.threshold = zeros(rows, dtype=torch.float32)
        self.trace = zeros(rows, length + 1, dtype=torch.int32)  # forced depths, then those that happened; 0: neither
        self.remaining = zeros(rows)
        self.stops = zeros(rows, MAX_STOPS)
        self.fenced, self.live = zeros(rows, dtype=torch.bool), zeros(rows, dtype=torch.bool)
        self.script = zeros(rows, length + 1, dtype=torch.int32)  # tokens known beforehand, plus one; 0: to be sampled
        self.tokens, self.count = zeros(rows, room), zeros(rows)  # of this step
        self.depths = zeros(rows, room)  # recurrences of the position that gave each of these tokens

    def admit(self, row: int, request: Request, rule: int) -> None:
        self.limit[row], self.minimum[row], self.rule[row] = request.limit, request.minimum, rule
        self.threshold[row] = request.threshold
        self.trace[row], self.script[row] = 0, 0
        self.trace[row, : len(request.trace)] = torch.tensor(request.trace, dtype=torch.int32)
        self.remaining[row] = request.remaining
        if len(request.stops) > MAX_STOPS:
            raise ValueError(f"{len(request.stops)} stop tokens: at most {MAX_STOPS}")
        self.stops[row] = -1
        self.stops[row, : len(request.stops)] = torch.tensor(request.stops, dtype=torch.long)
        self.fenced[row], self.live[row] = request.fenced, False


class Lanes:
    """Places for positions in flight. The first `rows * ring` belong to the rows, `ring` each; the rest to prompts."""

    def __init__(self, rows: int, ring: int, prompts: int, width: int, dtype: torch.dtype, device: torch.device):
        self.ring, self.own, count = ring, rows * ring, rows * ring + prompts
        self.row = torch.zeros(count, dtype=torch.long, device=device)
        self.position, self.depth, self.target = (torch.zeros_like(self.row) for _ in range(3))
        self.s = torch.zeros(count, width, dtype=dtype, device=device)
        self.e, self.read = torch.zeros_like(self.s), torch.zeros_like(self.s)  # input; state that is to be read out
        self.running, self.emits, self.exited, self.waiting = (
            torch.zeros_like(self.row, dtype=torch.bool) for _ in range(4)
        )
        # running: takes part in ticks; emits: a token comes of it; exited: has left, though it may run on for the
        # sake of its keys and values; waiting: is not read out yet

    def of(self, row: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """The row's own lane for a position."""
        return row * self.ring + position % self.ring
