"""Whole numbers that grow over a run. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Share of the run after which each schedule has reached its end, unless the recipe sets `ramp`.
RAMPS = {"constant": 0.0, "linear": 0.25, "1-sqrt": 0.75}


@dataclass(frozen=True)
class Schedule:
    """A whole number, at least 1, that grows with the optimiser step.

    end: the final value.   steps: optimiser steps of the run.   kind: a key of `RAMPS`, or `steps`.   ramp: share of
    the run until the end is reached (None: from `RAMPS`).   values: for `steps`, (share of the run, value from there
    on) in order, the first at 0; `end` is the last of them.
    """

    end: int
    steps: int
    kind: str = "constant"
    ramp: float | None = None
    values: tuple[tuple[float, int], ...] = ()

    @property
    def top(self) -> int:
        """The greatest value."""
        return max([self.end, *(value for _, value in self.values)])

    def at(self, step: int) -> int:
        """ceil(schedule), at least 1, for 0 <= `step` < `steps`."""
        if self.kind == "steps":
            return [value for share, value in self.values if step >= share * self.steps - 1e-9][-1]
        ramp = RAMPS[self.kind] if self.ramp is None else self.ramp
        done = step / (ramp * self.steps) if ramp * self.steps > 0 else 1.0
        if done >= 1 or self.kind == "constant":
            return self.end
        share = done if self.kind == "linear" else 1 - math.sqrt(1 - done)
        # Rounding errors must not lift an exact integer to the next one.
        return max(1, math.ceil(self.end * share - 1e-9))


def segment_ends(recurrences: int, segments: int) -> list[int]:
    """The last recurrence of each of `segments` segments of 1 .. `recurrences`, whose lengths differ by at most 1.

    There are fewer segments where there are fewer recurrences.
    """
    count = min(segments, recurrences)
    return [-(-recurrences * i // count) for i in range(1, count + 1)]


def capacities(final: list[float], step: int, warmup: int) -> list[float]:
    """Capacity of every recursion at `step`: it falls from 1 to `final` along a cosine over `warmup` steps.

    Source: the capacity warm-up of Mixture-of-Recursions (arXiv 2507.10524).
    """
    if step >= warmup:
        return list(final)
    left = 0.5 * (1 + math.cos(math.pi * step / warmup))
    return [capacity + (1 - capacity) * left for capacity in final]
