"""How many recurrences a training step runs, and how many of them carry gradient.

Both are pure functions of (seed, optimiser step): equal on every rank, under gradient accumulation and after a resume.
The recipe is that of retrofitted recurrence (arXiv 2511.07384), whose sampler is Huginn's (arXiv 2502.05171).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

# Share of the run after which each schedule has reached its mean, unless the recipe says otherwise.
RAMPS = {"constant": 0.0, "linear": 0.25, "1-sqrt": 0.75}
SAMPLERS = ("fixed", "poisson-lognormal")
SIGMA = 0.5


class Depth(NamedTuple):
    """R of one step, and how many of its last recurrences carry gradient (None: all)."""

    num_recurrences: int
    grad_recurrences: int | None


@dataclass(frozen=True)
class Curriculum:
    """A schedule of the mean, a sampler around it, and truncated backpropagation.

    mean: final mean of the schedule, at least 1.   max: cap on a sampled R.   backprop: at most this many of the last
    recurrences carry gradient (None: all).   steps: optimiser steps of the run.   ramp: share of them until the mean is
    reached (None: `RAMPS`).
    """

    mean: int
    steps: int
    schedule: str = "constant"
    ramp: float | None = None
    sampler: str = "fixed"
    max: int | None = None
    backprop: int | None = None
    seed: int = 0

    @property
    def cap(self) -> int:
        """The greatest R that any step can have."""
        if self.sampler == "fixed":
            return self.mean
        return self.max or max(8, 4 * self.mean)

    @property
    def truncates(self) -> bool:
        """Whether some step may run recurrences without gradient."""
        return self.backprop is not None and self.backprop < self.cap

    def mean_at(self, step: int) -> int:
        """r(t) = ceil(schedule), at least 1, for step 0 <= `step` < `steps`."""
        ramp = RAMPS[self.schedule] if self.ramp is None else self.ramp
        done = step / (ramp * self.steps) if ramp * self.steps > 0 else 1.0
        if done >= 1 or self.schedule == "constant":
            return self.mean
        share = done if self.schedule == "linear" else 1 - math.sqrt(1 - done)
        # Rounding error must not lift an exact integer to the next one.
        return max(1, math.ceil(self.mean * share - 1e-9))

    def at(self, step: int) -> Depth:
        """R and the number of recurrences with gradient of optimiser step `step`, counted from 0."""
        mean = self.mean_at(step)
        depth = mean if self.sampler == "fixed" else poisson_lognormal(mean, self.cap, *uniforms(self.seed, step))
        return Depth(depth, None if self.backprop is None else min(self.backprop, depth))


def uniforms(seed: int, step: int) -> tuple[float, float]:
    """Two numbers in (0, 1) that depend on (seed, step) alone: no generator state, and no library version, enters."""
    digest = hashlib.blake2b(f"recurrence/{seed}/{step}".encode(), digest_size=16).digest()
    first, second = (int.from_bytes(half, "little") >> 11 for half in (digest[:8], digest[8:]))
    return (first + 0.5) / 2**53, (second + 0.5) / 2**53


def poisson_lognormal(mean: int, cap: int, first: float, second: float) -> int:
    """p = Poisson(LogNormal(ln(mean) - sigma^2/2, sigma)) + 1, at most `cap`, by inversion of two uniforms.

    The rate has mean `mean`, so p has mean `mean` + 1: so do the papers and the authors' code.
    """
    rate = mean * math.exp(SIGMA * NormalDist().inv_cdf(first) - SIGMA**2 / 2)
    below = 0.0
    for count in range(cap - 1):
        below += math.exp(count * math.log(rate) - rate - math.lgamma(count + 1))
        if second < below:
            return count + 1
    return cap
