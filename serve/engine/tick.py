"""A tick: passes of the core until a lane leaves, a read-out, and the start of the next positions.

eager_tick.py chooses the lanes of each pass on the host; graph_tick.py replays CUDA graphs of a fixed width. Both have
the protocol `Tick`, and share a `TickContext`.
Shapes: m lanes that start, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from .costs import Costs
from .exits import ExitRules
from .forward import Forward
from .logprobs import Logprobs
from .readout_schedule import ReadoutSchedule
from .routing import Routing
from .state import State

T = TypeVar("T")
# (logits [m, V], the likeliest tokens [m] by them, rows [m], positions [m] of the tokens) -> tokens [m]
Sampler = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# (the head's input [m, D], rows [m], positions [m] of prompt tokens)
Reader = Callable[[Tensor, Tensor, Tensor], None]


class Chunk(NamedTuple):
    """Prompt lanes `first` to `last` (excluded) of a row, in order."""

    row: int
    first: int
    last: int


@dataclass
class Workload:
    """The requests of a step, as the ticks need to know them. The loop writes it.

    chunks: prompts that are not through.   in_use: rules and other features by name, with the number of resident
    requests that have them; a feature of none costs a pass nothing.   resident: requests of this step.   waves: rows
    with that decoder: recurrences before the first draft, and width.   budget: lanes that waves may fill; 0: no bound.
    costs: of passes and read-outs, if they were measured.
    """

    chunks: list[Chunk] = field(default_factory=list)
    in_use: Counter[str] = field(default_factory=Counter)
    resident: int = 0
    waves: dict[int, tuple[int, int]] = field(default_factory=dict)
    budget: int = 0
    costs: Costs | None = None


@dataclass
class Counts:
    """Passes of the core, and reads of coda and head, by their number of lanes."""

    passes: Counter[int] = field(default_factory=Counter)
    reads: Counter[int] = field(default_factory=Counter)


class Parked(NamedTuple):
    """Lanes [m] with their rows and positions [m] and head's input x [m, D], whose tokens the caller samples."""

    which: Tensor
    row: Tensor
    position: Tensor
    x: Tensor


class TickReport(NamedTuple):
    """passes: how many ran; 1, too, for a read-out alone; 0: nothing is left to do.   ended: a request has stopped.
    through: prompts that are through.   parked: see `Parked`."""

    passes: int
    ended: bool = False
    through: tuple[Chunk, ...] = ()
    parked: tuple[Parked, ...] = ()


class Tick(Protocol):
    """Runs the lanes of live requests."""

    def run(self, max_passes: int) -> TickReport:
        """Run at least one pass, at most `max_passes`, and what follows from it. Changes the State by transitions."""
        ...


@dataclass(eq=False)
class TickContext:
    """The parts that all ticks of a loop share. The loop makes them."""

    state: State
    forward: Forward
    rules: ExitRules
    routing: Routing | None
    schedule: ReadoutSchedule
    sampler: Sampler
    logprobs: Logprobs
    work: Workload = field(default_factory=Workload)
    counts: Counts = field(default_factory=Counts)

    def start(
        self,
        step: Callable[..., T],
        where: Tensor,
        row: Tensor,
        position: Tensor,
        tokens: Tensor,
        may_exit: Tensor | None = None,
        only: Tensor | None = None,
    ) -> T:
        """Start tokens [m] of rows at positions [m] in lanes `where` [m]: prelude, initial state, and the memory of
        exit rules and routers. Returns the result of `step`, transitions.steps.start on a State.

        may_exit [m]: the request's rule may end it; None: all.   only: as in Forward.prelude.
        """
        e = self.forward.prelude(tokens, row, position, only)
        may_exit = torch.ones_like(row, dtype=torch.bool) if may_exit is None else may_exit
        s = self.forward.initial_state(e, position)
        result = step(where, row, position, tokens, may_exit, e, s)
        if self.rules.in_use:
            self.rules.start(where)
        if self.routing:
            self.routing.start(self.state, where)
        return result
